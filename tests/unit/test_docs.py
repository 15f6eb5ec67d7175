"""Links lead to files, CONTRIBUTING.md names files that exist, and ports.md lists all listeners."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "*/*/README.md", "requirements/*.md")
    for page in ROOT.glob(pattern)
    if ".venv" not in page.parts
)
PRODUCT = ("cluster", "core", "engine", "kv_transfer", "router", "worker")
# Matches code that makes a process listen, on a network or on a UNIX socket.
LISTENS = re.compile(
    r"add_insecure_port\(|bind_to_random_port\(|make_server\(|create_device\(|RayParams\("
    r"|\.bind\((?:\(host|_?address)|add_port_to_grpc_server|f\"bind "
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`([\w./]+/[\w./]*\w\.(?:py|proto|md|toml|txt))`", text))
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]


def test_ports_lists_every_file_that_listens() -> None:
    listed = (ROOT / "docs" / "ports.md").read_text()
    listening = {
        str(file.relative_to(ROOT))
        for package in PRODUCT
        for file in (ROOT / package).rglob("*.py")
        if LISTENS.search(file.read_text())
    }
    assert "router/server.py" in listening
    assert not {file for file in listening if f"({Path('..') / file})" not in listed}

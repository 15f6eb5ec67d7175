"""``make lint`` fails for code in no layer, for an upward import, and for Ray outside cluster/ray.

The tests work in a copy of the tree. One test leaves the copy as it is, and the others plant a
mistake in it. Each test runs the commands of ``make lint`` that check layers and imports.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "root_packages"
]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of everything that the checks look at."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("*.pyc"))
    return copy


def lint(tree: Path) -> tuple[int, str]:
    """Return exit status and output of the commands of ``make lint`` that check layers."""
    status, output = 0, ""
    for command in (
        [sys.executable, str(ROOT / "tools" / "check_layers.py")],
        [str(LINT_IMPORTS), "--no-cache", "--no-logo"],
    ):
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60)
        status = status or done.returncode
        output += done.stdout + done.stderr
    return status, output


def test_the_tree_as_it_is_passes(tree: Path) -> None:
    status, output = lint(tree)
    assert status == 0, output


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("router/stray.py", "", "router.stray"),
        ("core/stray/__init__.py", "", "core.stray"),
        ("kv_transfer/stray.py", "", "kv_transfer.stray"),
        ("newcomer/__init__.py", "", "newcomer: in no layer"),
        ("core/types.py", "import router.phases\n", "core.types -> router.phases"),
        ("engine/fake.py", "import worker.intake\n", "engine.fake -> worker.intake"),
        ("router/text/stop.py", "import router.server\n", "router.text.stop -> router.server"),
        ("router/server.py", "import ray\n", "router.server -> ray"),
        ("cluster/local/launch.py", "import ray\n", "cluster.local.launch -> ray"),
        ("worker/replica.py", "from ray import serve\n", "worker.replica -> ray"),
    ],
)
def test_a_planted_mistake_fails(tree: Path, file: str, code: str, complaint: str) -> None:
    planted = tree / file
    before = planted.read_text() if planted.exists() else None
    planted.parent.mkdir(exist_ok=True)
    planted.write_text((before or "") + code)
    try:
        status, output = lint(tree)
    finally:
        if before is not None:
            planted.write_text(before)
        elif planted.name == "__init__.py":
            shutil.rmtree(planted.parent)
        else:
            planted.unlink()
    assert status != 0
    assert complaint in output

"""Rules that no linter checks: packages, folders, locked versions, sleeps, clocks and bounds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LOCKS = sorted((ROOT / "requirements").glob("*.lock.txt"))


def test_every_folder_with_code_is_packaged() -> None:
    tops = [path for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in tops
        if top.name != "tests"
        for init in top.rglob("__init__.py")
    }
    assert found == set(PACKAGES)


def test_linters_know_every_package() -> None:
    tops = {name.partition(".")[0] for name in PACKAGES}
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == tops
    assert set(PROJECT["tool"]["mypy"]["packages"]) == tops | {"tests"}


def test_no_python_lives_in_proto() -> None:
    """An importable package ``proto`` would shadow proto-plus, which Ray needs."""
    assert not list((ROOT / "proto").rglob("*.py*"))


def test_unit_tests_need_no_engine_and_no_cluster() -> None:
    script = (
        "import sys, core.config.schema, core.model.resolve, router, engine.protocol, baton; "
        "sys.exit(' '.join({'ray', 'torch', 'transformers', 'vllm'} & sys.modules.keys()) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def sleeps(path: Path) -> Iterator[str]:
    """Yield each call of a function whose name ends in "sleep", except sleep(0)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("sleep"):
            continue
        if [ast.unparse(arg) for arg in node.args] != ["0"]:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


SUPPORT = ROOT / "tests" / "support"
# Only these modules may sleep. The tests use waiting.py to wait for a condition or for a time.
# virtual_time.py sleeps in virtual time.
WAITING = {SUPPORT / "waiting.py", SUPPORT / "virtual_time.py"}


def test_tests_do_not_sleep() -> None:
    assert not [line for path in TESTS if path not in WAITING for line in sleeps(path)]


def test_no_clock_that_can_jump_is_read() -> None:
    """Deadlines and leases use monotonic time. Benchmarks may read wall time, certificates need
    dates, and the autoscaler's schedules the time of day."""
    packages = [ROOT.joinpath(*name.split(".")) for name in PACKAGES if name != "bench"]
    files = [path for package in packages for path in package.glob("*.py")]
    clocks = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.(now|utcnow|today)\b|\bCLOCK_REALTIME\b")
    found = [path for path in files if clocks.search(path.read_text())]
    assert sorted(found) == [
        ROOT / "cluster" / "autoscale" / "loop.py",
        ROOT / "core" / "rpc" / "credentials.py",
    ]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locks_pin_each_package_once(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines]
    assert len(names) == len(set(names))


def test_locks_hold_what_the_extras_pin() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for extra, lock in (("cpu", "cpu"), ("gpu", "gpu"), ("server", "cpu"), ("dev", "dev")):
        lines = (ROOT / "requirements" / f"{lock}.lock.txt").read_text().splitlines()
        pins = [re.sub(r"\[.*\]", "", line) for line in extras[extra] if "==" in line]
        assert set(pins) <= set(lines)


def test_the_cpu_lock_has_no_cuda_builds() -> None:
    lines = (ROOT / "requirements" / "cpu.lock.txt").read_text().splitlines()
    names = {line.partition("==")[0] for line in lines}
    assert not names & {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "llm"}


# Matches a constant that bounds a wait, a queue, a message or a count. The suffix of its name
# tells, which is usually a unit.
BOUND = re.compile(
    r"^_?[A-Z][A-Z0-9_]*_(?:S|MS|BYTES|CHARS|TOKENS|TOKEN_IDS|STOPS|LOGPROBS|ATTEMPTS|TRIES|LEASES"
    r"|CONNECTIONS|REQUESTS|LINES_PER_FILE|FRAMES_AT_A_TIME|CALLS|MARGIN|GRACE)(?:: \S+)? = [-\d.]"
)


def test_each_bound_in_the_code_gives_its_reason() -> None:
    """A bound that is no field of the configuration has a comment beside or above it."""
    packages = [ROOT.joinpath(*name.split(".")) for name in PACKAGES if name != "bench"]
    bare = []
    for file in (file for package in packages for file in package.glob("*.py")):
        above = ""
        for line in file.read_text().splitlines():
            if BOUND.match(line) and "#" not in line and not above.startswith("#"):
                bare.append(f"{file.relative_to(ROOT)}: {line}")
            # One comment may stand above several constants.
            above = above if BOUND.match(line) and above.startswith("#") else line
    assert not bare

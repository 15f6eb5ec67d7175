"""The client works where only Baton's wheel, a newer gRPC and a newer protobuf are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.unit.baton.scripted import answer, serve

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
NEWER = ("grpcio==1.85.3", "grpcio-health-checking==1.85.1", "protobuf==7.36.2")
SCRIPT = """\
import sys
from importlib.metadata import version

from baton import Client

with Client(sys.argv[1]) as client:
    print(client.complete("Hello").text, version("protobuf"))
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps")
    # The source is copied: setuptools leaves a build folder beside it.
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "build"))
    run(*pip, "--no-build-isolation", "--wheel-dir", folder, source)
    return next(folder.glob("*.whl"))


def test_the_client_holds_only_the_public_protocol(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("baton/")}
    protocol = {name for name in names if "_pb2" in name}
    assert protocol == {f"baton/v1/inference_{end}" for end in ("pb2.py", "pb2.pyi", "pb2_grpc.py")}


def test_the_client_runs_with_newer_grpc_and_protobuf(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", wheel, *NEWER)
    with serve(lambda request, context: iter(answer("Hi", " there"))) as server:
        text, protobuf = run(python, "-c", SCRIPT, server.address).rsplit(maxsplit=1)
    assert text == "Hi there"
    assert protobuf == "7.36.2"

"""Generates the stubs in baton/v1 and core/messages from proto/: ``make proto``.

With ``--check``, it leaves the stubs as they are and checks that they match proto/. pyproject.toml
pins grpcio-tools to 1.76.0, because old and new versions of protobuf can load the stubs that this
version generates.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
PROTO = ROOT / "proto"
SOURCES = sorted(PROTO.rglob("*.proto"))
FOLDERS = sorted({source.parent.relative_to(PROTO) for source in SOURCES})


def generate(target: Path) -> list[Path]:
    """Write the stubs under ``target`` and return their paths relative to it."""
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    names = [str(source.relative_to(PROTO)) for source in SOURCES]
    if protoc.main(["protoc", f"-I{PROTO}", *outputs, *names]):
        sys.exit("protoc failed")
    return _stubs_in(target)


def _stubs_in(root: Path) -> list[Path]:
    """Return the paths of all stubs, relative to ``root``."""
    return sorted(
        path.relative_to(root) for folder in FOLDERS for path in (root / folder).glob("*_pb2*.py*")
    )


def check() -> None:
    """If stubs do not match proto/, exit with an error that names them."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        expected = set(generate(fresh))
        committed = set(_stubs_in(ROOT))
        drifted = expected ^ committed | {
            path
            for path in expected & committed
            if (fresh / path).read_bytes() != (ROOT / path).read_bytes()
        }
    if drifted:
        sys.exit(
            "these stubs do not match proto/; run `make proto`: "
            + ", ".join(str(path) for path in sorted(drifted))
        )


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        check()
    else:
        generate(ROOT)

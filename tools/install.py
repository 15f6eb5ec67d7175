"""Installs the pinned packages into the environment that runs it, showing progress.

``.venv/bin/python tools/install.py cpu dev`` takes requirements/cpu.lock.txt and
dev.lock.txt. Run by ``make env``; only Python's library is there yet.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
SHOW_EVERY_S = 5.0


class Progress:
    """Counts pip's lines: one ``Collecting`` a package, then one folder for each installed."""

    def __init__(self, title: str, packages: int) -> None:
        self.title, self.packages = title, packages
        self.began_s = self.shown_s = time.monotonic()
        self.collected = 0
        self.installing = False
        self.done = threading.Event()
        self.site_packages = Path(sysconfig.get_path("purelib"))
        self.before = self._installed()

    def line(self, line: str) -> None:
        self.collected += line.startswith("Collecting ")
        self.installing |= line.startswith("Installing collected")

    def show_until_done(self) -> None:
        while not self.done.wait(SHOW_EVERY_S):
            if self.installing:
                text = f"installing {self._installed() - self.before}"
            else:
                text = f"fetching {self.collected}"
            elapsed_s = time.monotonic() - self.began_s
            print(f"  {self.title}: {text} of {self.packages}, {elapsed_s:.0f} s", flush=True)

    def _installed(self) -> int:
        return sum(1 for _ in self.site_packages.glob("*.dist-info"))


def run(title: str, packages: int, command: Sequence[str]) -> list[str] | None:
    """Run a command; ``None``, or its last lines if it failed."""
    progress = Progress(title, packages)
    shower = threading.Thread(target=progress.show_until_done)
    shower.start()
    last: deque[str] = deque(maxlen=15)
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                progress.line(line)
                last.append(line.rstrip())
    finally:
        progress.done.set()
        shower.join()
    return list(last) if process.returncode else None


def install_torch_cpu() -> None:
    """torch's CPU build: from where pip is set up to look, else from PyTorch's own index."""
    requirement = (REQUIREMENTS / "torch-cpu.txt").read_text().strip()
    if run("torch", 1, (*PIP, "install", "--no-deps", f"{requirement}+cpu")) is None:
        return
    print("  torch: pip finds no CPU build; asking PyTorch's index, which uv knows", flush=True)
    with tempfile.TemporaryDirectory() as folder:  # uv stays out of the environment
        failed = run("uv", 1, (*PIP, "install", "--target", folder, "uv"))
        if failed is None:
            uv = Path(folder) / "bin" / "uv"
            command = (str(uv), "pip", "install", "--python", sys.executable, "--no-deps")
            failed = run("torch", 1, (*command, "--torch-backend=cpu", requirement))
    if failed is not None:
        fail(
            failed,
            f"The CPU build of {requirement} could not be installed. Neither pip's configured "
            "sources nor PyTorch's own index gave it: check the network, or let pip's option "
            f"find-links name a folder with the wheel of {requirement}+cpu.",
        )


def install_lock(name: str) -> None:
    lock = REQUIREMENTS / f"{name}.lock.txt"
    packages = len(re.findall(r"^[^#\s]", lock.read_text(), re.MULTILINE))
    failed = run(name, packages, (*PIP, "install", "--no-deps", "-r", str(lock)))
    if failed is not None:
        fail(failed, f"{lock.name} could not be installed: check the network and the disk.")


def install_baton() -> None:
    """The project itself, editable, with the pinned setuptools: nothing more is fetched."""
    command = (*PIP, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    failed = run("baton", 1, command)
    if failed is not None:
        fail(failed, "Baton itself could not be installed.")
    shutil.rmtree(ROOT / "build", ignore_errors=True)


def fail(lines: Sequence[str], sentence: str) -> None:
    print("\n".join(lines), file=sys.stderr)
    sys.exit(sentence)


def main() -> None:
    names = sys.argv[1:] or ["cpu"]
    began_s = time.monotonic()
    if "cpu" in names:
        install_torch_cpu()
    for name in names:
        install_lock(name)
    install_baton()
    print(f"  installed in {time.monotonic() - began_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()

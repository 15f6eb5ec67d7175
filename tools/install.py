"""Installs the pinned packages and Baton for the Python that runs this script. Shows progress.

``.venv/bin/python tools/install.py cpu dev`` installs torch's CPU build, the packages of
requirements/cpu.lock.txt and dev.lock.txt, and Baton. ``make env`` runs the script in an
environment that may be empty, so the script uses only the standard library.
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
    """Prints how many packages pip has begun to fetch, and later how many it has installed."""

    def __init__(self, title: str, packages: int) -> None:
        self.title, self.packages = title, packages
        self.began_s = time.monotonic()
        self.collected = 0
        self.installing = False
        self.done = threading.Event()
        self.site_packages = Path(sysconfig.get_path("purelib"))
        self.installed_before = self._count_installed()

    def read_line(self, line: str) -> None:
        self.collected += line.startswith("Collecting ")
        self.installing |= line.startswith("Installing collected")

    def show_until_done(self) -> None:
        while not self.done.wait(SHOW_EVERY_S):
            if self.installing:
                text = f"installing {self._count_installed() - self.installed_before}"
            else:
                text = f"fetching {self.collected}"
            elapsed_s = time.monotonic() - self.began_s
            print(f"  {self.title}: {text} of {self.packages}, {elapsed_s:.0f} s", flush=True)

    def _count_installed(self) -> int:
        return sum(1 for _ in self.site_packages.glob("*.dist-info"))


def run(title: str, packages: int, command: Sequence[str]) -> list[str] | None:
    """Run a command and show progress. Return its last output lines if it fails, else ``None``."""
    progress = Progress(title, packages)
    reporter = threading.Thread(target=progress.show_until_done)
    reporter.start()
    last: deque[str] = deque(maxlen=15)
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                progress.read_line(line)
                last.append(line.rstrip())
    finally:
        progress.done.set()
        reporter.join()
    return list(last) if process.returncode else None


def install_torch_cpu() -> None:
    """Install torch's CPU build from pip's configured sources, or else from PyTorch's index."""
    requirement = (REQUIREMENTS / "torch-cpu.txt").read_text().strip()
    if run("torch", 1, (*PIP, "install", "--no-deps", f"{requirement}+cpu")) is None:
        return
    print("  torch: pip did not install the CPU build; trying PyTorch's index with uv", flush=True)
    with tempfile.TemporaryDirectory() as folder:  # keeps uv out of the environment
        failed = run("uv", 1, (*PIP, "install", "--target", folder, "uv"))
        if failed is None:
            uv = Path(folder) / "bin" / "uv"
            command = (str(uv), "pip", "install", "--python", sys.executable, "--no-deps")
            failed = run("torch", 1, (*command, "--torch-backend=cpu", requirement))
    if failed is not None:
        fail(
            failed,
            f"Installing the CPU build of {requirement} failed, both from pip's configured sources "
            "and from PyTorch's index. Check the network, or set pip's option find-links to a "
            f"folder with the wheel of {requirement}+cpu.",
        )


def install_lock(name: str) -> None:
    lock = REQUIREMENTS / f"{name}.lock.txt"
    packages = len(re.findall(r"^[^#\s]", lock.read_text(), re.MULTILINE))
    failed = run(name, packages, (*PIP, "install", "--no-deps", "-r", str(lock)))
    if failed is not None:
        fail(failed, f"Installing {lock.name} failed. Check the network and the free disk space.")


def load_unpacked_libraries() -> None:
    """Make each Python of this environment load the libraries that check_system.py has unpacked.

    The dynamic linker takes a library that is already loaded, whatever its path.
    """
    library = next((ROOT / ".venv" / "system").rglob("libnuma.so.1"), None)
    if library is not None:
        line = f"import ctypes; ctypes.CDLL({str(library)!r}, ctypes.RTLD_GLOBAL)\n"
        (Path(sysconfig.get_path("purelib")) / "baton_libraries.pth").write_text(line)


def install_baton() -> None:
    """Install Baton as an editable package. The pinned setuptools builds it without downloads."""
    command = (*PIP, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    failed = run("baton", 1, command)
    if failed is not None:
        fail(failed, "Installing Baton itself failed; pip's output above says why.")
    shutil.rmtree(ROOT / "build", ignore_errors=True)


def fail(lines: Sequence[str], message: str) -> None:
    print("\n".join(lines), file=sys.stderr)
    sys.exit(message)


def main() -> None:
    lock_names = sys.argv[1:] or ["cpu"]
    began_s = time.monotonic()
    load_unpacked_libraries()
    if "cpu" in lock_names:
        install_torch_cpu()
    for name in lock_names:
        install_lock(name)
    install_baton()
    print(f"  installed in {time.monotonic() - began_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""Prints what Baton needs but this machine lacks, and how to install it if that is possible.

``make check`` runs ``python3 tools/check_system.py cpu`` (or ``gpu``). ``make env`` adds
``--install``: then the script first installs libnuma, or unpacks it into .venv if it may not
install packages. The environment need not exist yet, so this script uses only the standard library.
It exits with 1 if something is missing.
"""

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 14)  # the pinned vLLM and torch have wheels for this range
DISK_GB = 6  # environment 3.1, model 0.3; the rest is for downloads that pip unpacks
MEMORY_GB = 8  # two engines, the router, Ray, Valkey

COMMAND_S = 120  # for one command; without a network, apt-get tries for long

GB = 1000**3
ROOT = Path(__file__).resolve().parents[1]
UNPACKED = ROOT / ".venv" / "system"  # packages of the system; tools/install.py makes them load


def python_problem() -> "str | None":
    version = sys.version_info[:2]
    if OLDEST <= version <= NEWEST:
        return None
    return (
        f"Baton needs Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}; {sys.executable} "
        f"is {version[0]}.{version[1]}. Install one of these (Debian 12, Ubuntu 24.04 or newer: "
        "apt-get install -y python3 python3-venv), or give a path: make PYTHON=/path/to/python3.12"
    )


def venv_problem() -> "str | None":
    if all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        return None
    return "Python lacks its module venv: apt-get install -y python3-venv"


def platform_problem() -> "str | None":
    if sys.platform != "linux":
        return f"Baton runs on Linux, not on {sys.platform}"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"vLLM has no wheels for {platform.machine()}"
    return None


def processor_problem() -> "str | None":
    if platform.machine() == "x86_64" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        return "vLLM's CPU build needs a processor with AVX2"
    return None


def lacks_libnuma() -> bool:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return not any(UNPACKED.rglob("libnuma.so.1"))
    return False


def libnuma_problem() -> "str | None":
    if lacks_libnuma():
        return "vLLM's CPU build needs libnuma.so.1: apt-get install -y libnuma1"
    return None


def install_libnuma() -> None:
    """Install Debian's package as root; else, or if that fails, unpack it into the environment.

    If nothing helps, the check that follows says what is missing.
    """
    if not shutil.which("apt-get"):
        return
    print("getting libnuma1 with apt-get", flush=True)
    if os.geteuid() == 0:
        install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "libnuma1"]
        # Without package lists the first try fails.
        if _succeeds(install) or (_succeeds(["apt-get", "update", "-qq"]) and _succeeds(install)):
            print("installed libnuma1", flush=True)
            return
    with tempfile.TemporaryDirectory() as folder:
        download = ["apt-get", "download", "-qq", "libnuma1"]
        own_lists = ["-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
        Path(folder, "lists", "partial").mkdir(parents=True)
        _succeeds(download, folder) or (
            _succeeds(["apt-get", "update", "-qq", *own_lists])
            and _succeeds([*download, *own_lists], folder)
        )
        for package in Path(folder).glob("*.deb"):
            UNPACKED.mkdir(parents=True, exist_ok=True)
            if _succeeds(["dpkg", "-x", str(package), str(UNPACKED)]):
                print(f"unpacked libnuma1 into {UNPACKED}", flush=True)


def _succeeds(command: "list[str]", folder: "str | None" = None) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=COMMAND_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def lscpu_problem() -> "str | None":
    if shutil.which("lscpu"):
        return None
    return "vLLM's CPU build calls lscpu: apt-get install -y util-linux"


def disk_problem(folder: Path) -> "str | None":
    if (folder / ".venv" / "bin").exists():
        return None
    free_gb = shutil.disk_usage(folder).free / GB
    if free_gb >= DISK_GB:
        return None
    return f"{folder} has {free_gb:.1f} GB free; the environment needs {DISK_GB}"


def memory_problem() -> "str | None":
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    if memory_gb >= MEMORY_GB:
        return None
    return (
        f"this machine has {memory_gb:.1f} GB of memory; a cluster of two workers needs {MEMORY_GB}"
    )


def main() -> None:
    if "--install" in sys.argv and "gpu" not in sys.argv and lacks_libnuma():
        install_libnuma()
    results = [python_problem(), venv_problem(), platform_problem()]
    if "gpu" not in sys.argv[1:]:
        results += [processor_problem(), libnuma_problem(), lscpu_problem()]
    results += [disk_problem(ROOT), memory_problem()]
    problems = [problem for problem in results if problem]
    for problem in problems:
        print(f"missing: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()

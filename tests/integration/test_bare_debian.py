"""On a Debian without any further package, ``make env`` gets libnuma by itself.

The tests need root and debootstrap, which builds such a system in a folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"  # the oldest Debian that has a Python for Baton
PACKAGES = "python3,python3-venv,make,git"
USER = "1000:1000"
KEPT = {"PATH", "http_proxy", "https_proxy", "no_proxy"}  # of the environment
# Prepares the environment as ``make env`` does, without the packages from PyPI, which are large.
PREPARE = """\
set -e
cd /srv/baton
python3 tools/check_system.py cpu --install
test -x .venv/bin/python || python3 -m venv .venv
.venv/bin/python -c 'import sys; sys.path.insert(0, "tools"); import install
install.load_unpacked_libraries()'
.venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1"); print("loaded")'
"""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can build a Debian system"),
    pytest.mark.skipif(not shutil.which("debootstrap"), reason="needs debootstrap"),
]


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("debian")
    folder.chmod(0o755)
    command = ("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(folder))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("user", "said"),
    [(USER, "unpacked libnuma1 into"), ("0:0", "installed libnuma1")],
    ids=["user", "root"],
)
def test_libnuma_is_installed(debian: Path, user: str, said: str) -> None:
    home = debian / "srv" / "baton"
    for name in ("tools", "requirements"):
        shutil.copytree(ROOT / name, home / name)
    script = home / "prepare.sh"
    script.write_text(PREPARE)
    os.chown(home, *map(int, user.split(":")))
    # The mounts end with the namespace.
    enter = (
        f"mount --bind /proc {debian}/proc && mount --bind /dev {debian}/dev && "
        f"exec chroot --userspec={user} {debian} sh /srv/baton/prepare.sh"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", enter],
        env={name: value for name, value in os.environ.items() if name in KEPT},
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(home)
    subprocess.run(["chroot", debian, "dpkg", "--remove", "libnuma1"], check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert done.stdout.endswith("loaded\n")

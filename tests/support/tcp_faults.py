"""Cuts TCP connections between running processes, or drops everything that arrives at their ends.

This module duplicates the processes' sockets. It needs Linux, and processes of the same user.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

_PIDFD_GETFD = 438  # number of the system call on every architecture
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class End:
    """One end of a connection, in one process."""

    pid: int
    fd: int
    port: int
    peer_port: int

    @contextmanager
    def socket(self) -> Iterator[socket.socket]:
        """Yield a duplicate of the process's socket."""
        process = os.pidfd_open(self.pid)
        try:
            fd = _libc.syscall(_PIDFD_GETFD, process, self.fd, 0)
            if fd < 0:
                raise OSError(ctypes.get_errno(), f"cannot borrow a socket of process {self.pid}")
        finally:
            os.close(process)
        with socket.socket(fileno=fd) as borrowed:
            yield borrowed


def ends(pid: int, *, port: int | None = None) -> list[End]:
    """Return a process's ends of its open connections. If the process has ended, return no end.

    ``port``: if given, return only connections that have this port at either end.
    """
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess:
        return []
    return [
        End(pid, each.fd, each.laddr.port, each.raddr.port)
        for each in connections
        if each.status == psutil.CONN_ESTABLISHED
        and port in (None, each.laddr.port, each.raddr.port)
    ]


def cut(connections: list[End]) -> None:
    """Close the connections in both directions. Both sides notice."""
    for end in connections:
        with suppress(OSError), end.socket() as borrowed:  # the process may have closed it
            borrowed.shutdown(socket.SHUT_RDWR)


@contextmanager
def silence(connections: list[End]) -> Iterator[None]:
    """During the block, drop all packets that arrive at these ends, acknowledgements included. The
    connections stay open: neither side receives a FIN or RST."""
    program = struct.pack("HL", 1, ctypes.addressof(_DROP_ALL))
    _set_option(connections, _SO_ATTACH_FILTER, program)
    try:
        yield
    finally:
        _set_option(connections, _SO_DETACH_FILTER, 0)


def _set_option(connections: list[End], option: int, value: bytes | int) -> None:
    for end in connections:
        with suppress(OSError), end.socket() as borrowed:  # the process may have closed it
            borrowed.setsockopt(socket.SOL_SOCKET, option, value)

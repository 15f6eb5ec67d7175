"""Gives memory that this process does not use back to the system. Needs Linux."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def trim_heap() -> None:
    """Give back the memory that was only needed to start. Takes milliseconds.

    Has no effect with a libc other than glibc.
    """
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(0)


def drop_zeros(address: int, size: int) -> None:
    """Give back the whole pages in a range of private memory that contains only zeros.

    They still read as zeros, and take memory again when something is written to them.

    Args:
        size: length of the range in bytes.
    """
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        _libc.madvise(begin, end - begin, mmap.MADV_DONTNEED)  # without effect if refused

"""What the process keeps of the memory that requests have used."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BYTES = 4 * 2**20


def return_large_blocks() -> None:
    """With glibc: blocks from 4 MiB on go back to the system when they are freed. Without it, nothing happens.

    By default glibc raises this threshold to the size of what is freed, up to 32 MiB, and then places such blocks among
    small ones: after a few images of ten megapixels every thread's heap keeps as much (mallopt(3)).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * LARGE_BYTES)

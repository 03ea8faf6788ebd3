"""Memory that was freed is kept for what comes next.

Inner steps make and drop the same tensors again and again. The GNU C library gives some of that memory back to the
system as soon as it is free, and the next step pays for every page of it anew, which may cost more than the arithmetic.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 2**25  # bytes, the most that every version takes: larger blocks are still the system's own, and given back
_PAD = 2**26


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, blocks of more than 32 MiB excepted; for programs, once, at their start.

    Returns:
        Whether the C library can be told so; where not (macOS, Windows, musl), nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _PAD))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)

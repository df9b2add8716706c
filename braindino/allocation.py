"""How the C library hands out the memory of large arrays. Where it is not glibc, nothing changes."""

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LARGE_BYTES = 32 << 20


def keep_freed_memory() -> None:
    """Let freed arrays be used again instead of giving them back and asking for fresh, zeroed pages.

    For processes that make the same few large arrays over and over: preparing a scan takes an eighth less time
    (benchmarks/RESULTS.md).
    """
    _set(_M_MMAP_MAX, 0)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_large_arrays() -> None:
    """Give arrays of 32 MiB and more a mapping of their own, which goes back to the system with them.

    For processes that hold many arrays of many sizes for long: left to itself the C library fills its heap with holes,
    in a training step a third of it. Smaller arrays that are freed are used again, as in :func:`keep_freed_memory`
    (benchmarks/RESULTS.md).
    """
    _set(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def _set(parameter: int, value: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(parameter, value)

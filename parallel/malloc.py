"""What is asked of the C library's allocator, where it is glibc; nothing elsewhere.

The numbers are those of malloc.h (mallopt(3)).
"""

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # setting it also ends the learning
_M_ARENA_MAX = -8
_LARGE_BYTES = 1 << 20


def _set(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)


def give_back_pieces() -> None:
    """Have freed pieces given back at once.

    glibc learns from the first large piece that is freed to keep such sizes, and they pile up:
    3.5 GiB instead of 0.6 for a bf16 export of two billion parameters.
    """
    _set(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def share_one_heap() -> None:
    """Have threads that start from now on take their memory from the heap that is there.

    glibc gives each thread an arena of its own, which keeps what that thread has freed. Threads of
    a rank on a CPU (reading ahead, saving, the page) hand their memory to others or rest most of
    the time, so that the peak of the demo was 25 MiB higher for it.
    """
    _set(_M_ARENA_MAX, 1)

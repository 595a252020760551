"""How this process deals with memory."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]


def keep_freed_memory() -> None:
    """Let the C library reuse the memory of large tensors instead of giving it back and asking for it again.

    Every return costs a page fault for each 4 KiB of the next tensor, a tenth of an episode's time. For the whole
    process; only glibc is asked, elsewhere nothing happens.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        return
    # <malloc.h>: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD (at most 32 MiB), M_ARENA_MAX.
    for option, value in ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**25), (-8, 1)):
        library.mallopt(option, value)

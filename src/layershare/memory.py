"""What the C library does with freed memory."""

import ctypes
import platform

_M_MMAP_THRESHOLD = -3  # as <malloc.h> has it
_LARGE = 128 << 10


def give_back_freed_memory() -> None:
    """Return freed memory to the system: what lies in holes now, from now on every 128 KiB or more when it is freed.

    From that size on glibc makes an allocation a mapping of its own, but it raises the limit to the size of what is
    freed, up to 32 MiB, and keeps the holes that the rest leaves: the tensors of a block that is done would stay beside
    the next one's. Holds for the whole process. Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.malloc_trim(0)

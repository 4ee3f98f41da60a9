"""What the C library does with freed memory."""

import ctypes
import platform

_M_MMAP_THRESHOLD = -3  # as <malloc.h> has it
_LARGE = 128 << 10


def give_back_large_tensors() -> None:
    """Let every allocation of 128 KiB or more be a mapping of its own, which returns to the system when it is freed.

    With that threshold glibc starts, but it raises it to the size of what is freed, up to 32 MiB, and serves everything
    smaller from heaps whose holes it keeps: the tensors of a block that is done would stay beside the next one's. Set
    for the whole process. Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)

"""What the C library does with freed memory."""

import ctypes
import platform

_M_MMAP_THRESHOLD = -3  # as <malloc.h> has it
_LARGE = 4 << 20


def give_back_freed_memory() -> None:
    """Trim the heap now, and let glibc unmap any block of 4 MiB or more as soon as it is freed.

    By default glibc raises that threshold to the size of the largest block freed so far, up to 32 MiB, and keeps the
    holes that smaller blocks leave, so one block's tensors would stay resident beside the next one's: the peak of
    calibrating is twice as high then (`benchmarks/memory`). With the threshold that it starts from, 128 KiB, a third of
    a small model's time goes into mapping pages anew. Applies to the whole process; does nothing where the C library is
    not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.malloc_trim(0)

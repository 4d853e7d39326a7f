"""Weights in huge pages, where Linux gives them only to memory that asks for them (`transparent_hugepage/enabled` is often "madvise").

A forward pass reads every weight once. In pages of 4 KB, half as long as reading them takes finding out where the next page is.
"""

from __future__ import annotations

import ctypes
import sys

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # <linux/mman.h>; the second, which moves what is already there, since Linux 6.1


def use_huge_pages(address: int, size: int) -> bool:
    """Move the whole huge pages within a piece of this process's memory into such pages; its content and address stay.

    Args:
        address: of the first byte
        size: bytes

    Returns:
        whether they were moved: not if there is none, on another system, or where the kernel has no such memory
    """
    first, end = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
    if sys.platform != "linux" or end <= first:
        return False
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return all(advise(first, end - first, advice) == 0 for advice in (MADV_HUGEPAGE, MADV_COLLAPSE))

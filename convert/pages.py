"""Memory maps of files larger than memory."""

import mmap


def let_go(mapped: mmap.mmap, offset: int, count: int) -> None:
    """Unmap the pages of `count` bytes from `offset`; they are read again if they are used again.

    Pages count as memory of the process once touched: a model of 16 GB would seem to take 16 GB.
    """
    begin = offset - offset % mmap.PAGESIZE
    length = min(offset + count, len(mapped)) - begin
    if length > 0 and hasattr(mapped, "madvise"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED, begin, length)

"""A function over many items by threads, results in order, without holding more than a bounded number of bytes."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
# Decoders leave the interpreter free; what does not, such as reading rows, takes about a thread in two.
THREADS = 2
# Items and bytes that wait for their turn.
AHEAD, AHEAD_BYTES = 16, 128 << 20


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[T], R], items: Iterable[T], weigh: Callable[[T], int], threads: int = THREADS
) -> Iterator[R]:
    """function(item) in the order of `items`, of which AHEAD are taken in advance while they weigh up to AHEAD_BYTES.

    What the function raises is raised here, in its turn.
    """
    held: deque = deque()
    weight, ahead = 0, max(AHEAD, 4 * threads)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                while held and (len(held) == ahead or weight + weigh(item) > AHEAD_BYTES):
                    result, light = held.popleft()
                    yield result.result()
                    weight -= light
                held.append((pool.submit(function, item), weigh(item)))
                weight += held[-1][1]
                del item  # its bytes are the pool's alone now
            while held:
                yield held.popleft()[0].result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

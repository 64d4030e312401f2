"""One step ahead: the next item of an iterator is made in a thread while the caller works with the last one.

For work that leaves Python's lock free (tokenising, decoding, waiting). Order is kept and at most one item waits. An
error of the iterator is raised where its item would have come.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order."""
    source = iter(items)

    def following() -> list[T]:
        return list(islice(source, 1))

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(following)
        while ready := coming.result():
            coming = thread.submit(following)
            yield from ready

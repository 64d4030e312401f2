"""A function over many tasks in several processes: results in the order of the tasks, few of them held at a time.

The processes end with their parent, however that ends: they live as long as it holds its end of a pipe. A worker that
is killed (no memory) is a UsageError, not a wait without end.
"""

import gc
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from shared.command import UsageError

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], tasks: Iterable[T], processes: int) -> Generator[R, None, None]:
    """work(task) of every task, in order; at most processes + 1 tasks are begun and not yet taken.

    `processes` 0 means one per core. Close the iterator, or leave it by an exception, and the processes end at once.
    """
    number = processes or os.cpu_count() or 1
    held, holder = os.pipe()
    # A fork starts in milliseconds and needs no copy of `work`; no thread of ours runs here yet.
    pool = ProcessPoolExecutor(number, get_context("fork"), initializer=_begin, initargs=(held, holder))
    waiting: deque[Future[R]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_done, work, task))
            if len(waiting) > number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UsageError(
            "a process that reads XML was killed, probably for want of memory; lower DRZERO_INGEST__WORKERS"
        ) from error
    finally:
        os.close(holder)
        pool.shutdown(cancel_futures=True)
        os.close(held)


def _begin(held: int, holder: int) -> None:
    os.close(holder)  # else this process would keep its siblings alive
    # Ctrl-C and a stop of the service reach the whole group; only the parent decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()
    gc.disable()
    threading.Thread(target=_end_with_parent, args=(held,), daemon=True).start()


def _done(work: Callable[[T], R], task: T) -> R:
    # Looking for cycles while a file is parsed costs a tenth of the time; the only ones are a parser's own.
    result = work(task)
    gc.collect()
    return result


def _end_with_parent(held: int) -> None:
    os.read(held, 1)  # nobody writes: this returns when the last holder of the other end is gone
    os._exit(1)

"""The one process that drives a run: its lock, and `driver.json`, which tells others what it does.

`driver.json` has `stage` (e.g. "1.train"), `since` (Unix time), `steps` of the training of each role, `waiting` (why
the driver waits, or null) and `ended` (how it ended, or null). A driver that was killed leaves `ended` null; whether
one is alive says the lock.
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.command import UsageError
from shared.files import write_atomically

LOCK, FILE = ".driver.lock", "driver.json"
LOOKS, LOOK_S = 10, 0.1  # for a lock that `is_driven` may be holding for an instant


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Raise UsageError when another process drives this run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as stream:
        for look in range(LOOKS):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if look + 1 == LOOKS:
                    raise UsageError(f"another process drives the run {folder}; wait for it or stop it") from error
                time.sleep(LOOK_S)
        yield


def is_driven(folder: Path) -> bool:
    """Whether a process drives this run, on this machine or on one that shares the file system and its locks."""
    try:
        with (folder / LOCK).open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def note(folder: Path, **values: Any) -> None:
    """Change these entries of driver.json."""
    write_atomically(folder / FILE, json.dumps({**read_driver(folder), **values}))


def read_driver(folder: Path) -> dict[str, Any]:
    """What the newest driver has noted; {} when there was none."""
    try:
        noted: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return noted


@contextmanager
def noting_end(folder: Path) -> Iterator[None]:
    """Note how the block has ended, and let its exception pass."""
    try:
        yield
    except Exception as error:
        note(folder, waiting=None, ended=f"{error}" or type(error).__name__)
        raise
    note(folder, waiting=None, ended="all stages are done")

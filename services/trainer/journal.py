"""Work that is kept item by item: results are appended to a file as they come, and what is there is not made again.

For stages that ask services thousands of questions. A journal belongs to a key, the hash of all that shapes its
results; with another key it begins anew. A last line that a kill has cut off is dropped.
"""

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from services.trainer.records import read_lines
from shared.files import write_atomically
from shared.progress import Progress

Row = dict[str, Any]


def open_journal(folder: Path, key: str) -> Path:
    """The folder of a stage's journals; what another key has left there is removed."""
    state = folder / "state.json"
    if not state.is_file() or json.loads(state.read_text(encoding="utf-8"))["key"] != key:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(state, json.dumps({"key": key}), alone=True)
    return folder


async def journalled(
    file: Path, names: Sequence[str], work: Callable[[str], Awaitable[Row]], *, at_once: int, progress: Progress
) -> list[Row]:
    """Each name with what `work` makes of it, in their order; `at_once` are made together. The first error ends all."""
    done = read_journal(file)
    places = asyncio.Semaphore(at_once)
    with file.open("a", encoding="utf-8") as stream:

        async def one(name: str) -> None:
            if name not in done:
                async with places:
                    done[name] = await work(name)
                stream.write(json.dumps({"name": name, **done[name]}, ensure_ascii=False) + "\n")
                stream.flush()
            progress.advance()

        tasks = [asyncio.create_task(one(name)) for name in names]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return [{"name": name, **done[name]} for name in names]


def read_journal(file: Path) -> dict[str, Row]:
    """The results of a journal by name; a last line that is not whole is cut off the file."""
    if not file.is_file():
        return {}
    data = file.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)  # in place: a kill here loses no line
    return {row.pop("name"): row for row in read_lines(file)}

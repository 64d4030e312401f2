"""`runs/<run>/state.json`: which stages of a run have finished, with what they left, and what each has cost.

The artifacts' own manifests decide what is made again; the state is the record beside them: identity of the artifact,
when it finished, seconds of wall clock, energy of the GPUs where they report it, and money where a price is set.
A stage that was interrupted and resumed has the sum of its parts. What has not finished yet stands under `unfinished`,
beside the account of the artifact that was finished before, if there is one. It is noted every few seconds while a
stage runs: of a driver that is killed, no more than that is lost.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.files import read_manifest, write_atomically
from shared.hardware import energy_joules
from shared.settings import Settings

FILE = "state.json"
BEAT_S = 5.0
NEW: dict[str, Any] = {
    "artifact": None, "finished": None, "seconds": 0.0, "energy_wh": None, "cost": None, "unfinished": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spent:
    """What a part of a stage has taken; energy is None where no card reports it."""

    seconds: float = 0.0
    energy_wh: float | None = None

    def __add__(self, more: "Spent") -> "Spent":
        return Spent(self.seconds + more.seconds, _sum(self.energy_wh, more.energy_wh))


class RunState:
    """The state of one run, written while a stage runs and after each, finished or not. One driver has it at a time."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._file = folder / FILE
        self._price = settings.trainer.price_per_hour
        self.stages = read_state(folder)

    @contextmanager
    def timing(self, label: str, artifact: Path) -> Iterator[None]:
        """Count what the block takes for the stage `label`; with a good end the stage has finished."""
        before = NEW | self.stages.get(label, {})
        account = self._meter(before["unfinished"])
        identity = None
        try:
            with self._noting(label, before, account):
                yield
            identity = read_manifest(artifact).identity
        finally:
            if identity is None:
                after = before | {"unfinished": account()}
            elif identity == before["artifact"]:
                after = before  # reused: it costs nothing again
            else:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                after = NEW | {"artifact": identity, "finished": now, **account()}
            self._write(label, after)

    @contextmanager
    def _noting(self, label: str, before: Mapping[str, Any], account: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Write what the block has taken so far, every BEAT_S seconds."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                self._write(label, {**before, "unfinished": account()})

        thread = threading.Thread(target=beat, name="state", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _meter(self, earlier: Mapping[str, Any] | None) -> Callable[[], dict[str, Any]]:
        """A function that gives the account of what has been taken `earlier` and since now."""
        before = Spent(earlier["seconds"], earlier["energy_wh"]) if earlier else Spent()
        began, energy = time.monotonic(), energy_joules()

        def account() -> dict[str, Any]:
            seconds, now = time.monotonic() - began, energy_joules()
            spent = before + Spent(seconds, None if now is None or energy is None else (now - energy) / 3600)
            cost = round(spent.seconds / 3600 * self._price, 4) if self._price else None
            return {"seconds": round(spent.seconds, 1), "energy_wh": spent.energy_wh, "cost": cost}

        return account

    def _write(self, label: str, stage: dict[str, Any]) -> None:
        if self.stages.get(label) != stage:
            self.stages[label] = stage
            write_atomically(self._file, json.dumps({"stages": self.stages}, indent=2) + "\n", alone=True)


def read_state(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages of a run by label, e.g. "1.seeds"; none when it has not begun."""
    file = folder / FILE
    if not file.is_file():
        return {}
    stages: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["stages"]
    return stages


def _sum(before: float | None, more: float | None) -> float | None:
    return before if more is None else round((before or 0.0) + more, 3)

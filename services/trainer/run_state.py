"""`runs/<run>/state.json`: which stages of a run have finished, with what they left, and what each has cost.

The artifacts' own manifests decide what is made again; the state is the record beside them: identity of the artifact,
when it finished, seconds of wall clock, energy of the GPUs where they report it, and money where a price is set.
A stage that was interrupted and resumed has the sum of its parts. While a stage runs, its part is noted every few
seconds as `cut_off`: of a driver that is killed, no more than that is lost.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.files import read_manifest, write_atomically
from shared.hardware import energy_joules
from shared.settings import Settings

FILE = "state.json"
BEAT_S = 5.0


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
        state = _read(folder)
        self.stages: dict[str, dict[str, Any]] = state["stages"]
        self._cut_off = {label: Spent(**part) for label, part in state.get("cut_off", {}).items()}

    @contextmanager
    def timing(self, label: str, artifact: Path) -> Iterator[None]:
        """Count what the block takes for the stage `label`; with a good end the stage has finished."""
        spent = _meter(self._cut_off.get(label, Spent()))
        finished = False
        try:
            with self._noting(label, spent):
                yield
            finished = True
        finally:
            self._add(label, spent(), artifact if finished else None)

    @contextmanager
    def _noting(self, label: str, spent: Callable[[], Spent]) -> Iterator[None]:
        """Write what the block has taken so far, every BEAT_S seconds."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                self._cut_off[label] = spent()
                self._write()

        thread = threading.Thread(target=beat, name="state", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _add(self, label: str, part: Spent, artifact: Path | None) -> None:
        noted = self._cut_off.pop(label, None)
        stage = self.stages.get(label, {})
        identity = read_manifest(artifact).identity if artifact else None
        if identity is not None and stage.get("artifact") == identity:  # reused: it costs nothing again
            if noted:
                self._write()
            return
        if stage.get("artifact"):
            stage = {}  # finished before, and made again now
        total = Spent(float(stage.get("seconds", 0.0)), stage.get("energy_wh")) + part
        self.stages[label] = {
            "artifact": identity,
            "finished": datetime.now(UTC).isoformat(timespec="seconds") if identity else None,
            "seconds": round(total.seconds, 1),
            "energy_wh": total.energy_wh,
            "cost": round(total.seconds / 3600 * self._price, 4) if self._price else None,
        }
        self._write()

    def _write(self) -> None:
        cut_off = {label: asdict(part) for label, part in self._cut_off.items()}
        text = json.dumps({"stages": self.stages, "cut_off": cut_off}, indent=2) + "\n"
        write_atomically(self._file, text, alone=True)


def read_state(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages of a run by label, e.g. "1.seeds"; none when it has not begun."""
    stages: dict[str, dict[str, Any]] = _read(folder)["stages"]
    return stages


def _read(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"stages": {}}
    return state


def _meter(earlier: Spent) -> Callable[[], Spent]:
    """A function that says what has been taken since now, with what was taken `earlier`."""
    began, energy = time.monotonic(), energy_joules()

    def spent() -> Spent:
        seconds, now = time.monotonic() - began, energy_joules()
        return earlier + Spent(seconds, None if now is None or energy is None else (now - energy) / 3600)

    return spent


def _sum(before: float | None, more: float | None) -> float | None:
    return before if more is None else round((before or 0.0) + more, 3)

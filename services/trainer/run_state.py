"""`runs/<run>/state.json`: which stages of a run have finished, with what they left, and what each has cost.

The artifacts' own manifests decide what is made again; the state is the record beside them: identity of the artifact,
when it finished, seconds of wall clock, energy of the GPUs where they report it, and money where a price is set.
A stage that was interrupted and resumed has the sum of its parts. What has not finished yet stands under `unfinished`,
beside the account of the artifact that was finished before, if there is one.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.files import read_manifest, write_atomically
from shared.hardware import energy_joules
from shared.settings import Settings

FILE = "state.json"

Account = dict[str, float | None]
NOTHING: Account = {"seconds": 0.0, "energy_wh": None, "cost": None}
NEW: dict[str, Any] = {"artifact": None, "finished": None, **NOTHING, "unfinished": None}


class RunState:
    """The state of one run, written after each stage, finished or not."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._file = folder / FILE
        self._price = settings.trainer.price_per_hour
        self.stages = read_state(folder)

    @contextmanager
    def timing(self, label: str, artifact: Path) -> Iterator[None]:
        """Count what the block takes for the stage `label`; with a good end the stage has finished."""
        began, energy = time.monotonic(), energy_joules()
        finished = False
        try:
            yield
            finished = True
        finally:
            seconds, now = time.monotonic() - began, energy_joules()
            joules = now - energy if now is not None and energy is not None else None
            self._add(label, seconds, joules, artifact if finished else None)

    def _add(self, label: str, seconds: float, joules: float | None, artifact: Path | None) -> None:
        stage = NEW | self.stages.get(label, {})
        spent = self._account(stage["unfinished"] or NOTHING, seconds, joules)
        if artifact is None:
            self.stages[label] = stage | {"unfinished": spent}
        else:
            identity = read_manifest(artifact).identity
            if stage["artifact"] == identity:
                return  # reused: it costs nothing again
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self.stages[label] = {"artifact": identity, "finished": now, **spent, "unfinished": None}
        write_atomically(self._file, json.dumps({"stages": self.stages}, indent=2) + "\n")

    def _account(self, before: Account, seconds: float, joules: float | None) -> Account:
        spent = (before["seconds"] or 0.0) + seconds
        return {
            "seconds": round(spent, 1),
            "energy_wh": _sum(before["energy_wh"], None if joules is None else joules / 3600),
            "cost": round(spent / 3600 * self._price, 4) if self._price else None,
        }


def read_state(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages of a run by label, e.g. "1.seeds"; none when it has not begun."""
    file = folder / FILE
    if not file.is_file():
        return {}
    stages: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["stages"]
    return stages


def _sum(before: float | None, more: float | None) -> float | None:
    return before if more is None else round((before or 0.0) + more, 3)

"""What a training has written so far: verdicts of the reward workers and metrics of verl, readable while it runs.

Each reward worker appends to a file of its own, each attempt of verl to another metrics file. A last line that a kill
has cut off is skipped. Before a resume, `compact` drops the verdicts of steps that will be repeated.

A verdict names its `rollout` and when judging it `began`. A step that is refused is judged again, and what had begun
before no longer counts, however late it is written.
"""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shared.files import write_atomically

Verdict = dict[str, Any]
NOT_PARTS = frozenset({"time", "began", "generated", "step", "index", "hop"})
TRAIN, HELD_OUT = "train", "held_out"
REFUSALS = "refusals.jsonl"
DEFECTS = "defects.jsonl"
KEPT = "kept.jsonl"  # whole, once it is there


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete JSON lines of a file."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def read_verdicts(log: Path, split: str) -> dict[int, list[Verdict]]:
    """Verdicts of a split by step, in the order of their seeds; those of a refused try of a step are left out."""
    by_step: dict[int, list[Verdict]] = defaultdict(list)
    refused = {refusal["step"]: refusal["time"] for refusal in read_refusals(log)}
    for path in sorted(log.glob("verdicts-*.jsonl")):
        for verdict in read_lines(path):
            again = split == TRAIN and verdict.get("began", verdict["time"]) <= refused.get(verdict["step"], 0.0)
            if verdict["split"] == split and not again:
                by_step[verdict["step"]].append(verdict)
    return {step: sorted(by_step[step], key=lambda v: (v["index"], v["time"])) for step in sorted(by_step)}


class VerdictTail:
    """The verdicts of a run as they are written, each once."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read: dict[Path, int] = defaultdict(int)

    def new(self) -> Iterator[Verdict]:
        """What has been written since the last call, file by file."""
        for path in sorted(self._log.glob("verdicts-*.jsonl")):
            with path.open("rb") as stream:
                stream.seek(self._read[path])
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    self._read[path] += len(line)
                    yield json.loads(line)


def append_defect(log: Path, text: str) -> None:
    """Write down why a rollout could not be judged at all, for the trainer that waits for its verdict."""
    with (log / DEFECTS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": time.time(), "text": text}, ensure_ascii=False) + "\n")


def first_defect(log: Path) -> str | None:
    """What the first rollout met that could not be judged, or None."""
    path = log / DEFECTS
    return next((line["text"] for line in read_lines(path)), None) if path.is_file() else None


def append_refusal(log: Path, *, step: int, text: str) -> None:
    """Write down that a try of a step was refused; what was rolled out for it so far no longer counts."""
    line = json.dumps({"step": step, "time": time.time(), "text": text}) + "\n"
    with (log / REFUSALS).open("a", encoding="utf-8") as stream:
        stream.write(line)


def read_refusals(log: Path) -> list[dict[str, Any]]:
    """All refusals of the run, oldest first."""
    path = log / REFUSALS
    return list(read_lines(path)) if path.is_file() else []


def compact(log: Path, *, through: int, validation_stands: Callable[[list[Verdict]], bool]) -> None:
    """Keep verdicts and metrics of training steps ≤ `through` and the validations that stand, drop the rest.

    Killed at any moment and called again, it loses no verdict and has none twice.
    """
    put_in_place(log)
    kept = [v for step, rows in read_verdicts(log, TRAIN).items() if step <= through for v in rows]
    validations = read_verdicts(log, HELD_OUT).items()
    kept += [v for step, rows in validations if step <= through and validation_stands(rows) for v in rows]
    (log / DEFECTS).unlink(missing_ok=True)
    lines = "".join(json.dumps(verdict, ensure_ascii=False) + "\n" for verdict in kept)
    write_atomically(log / KEPT, lines, alone=True)
    put_in_place(log)
    for path in log.glob("metrics-*.jsonl"):
        written = path.stat().st_mtime  # when that attempt ended, see seconds_trained
        kept_lines = (json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= through)
        write_atomically(path, "".join(kept_lines), alone=True)
        os.utime(path, (written, written))


def put_in_place(log: Path) -> None:
    """Put the verdicts that `compact` has kept in the place of all others; also of one that a kill has cut off."""
    if (log / KEPT).is_file():
        for path in log.glob("verdicts-*.jsonl"):
            path.unlink()
        (log / KEPT).replace(log / "verdicts-0.jsonl")


def read_metrics(log: Path) -> dict[int, dict[str, float]]:
    """verl's metrics by step, from the logs of all attempts; the newest attempt counts.

    verl's log writes numbers that are not finite as null; they are nan here.
    """
    merged: dict[int, dict[str, float]] = {}
    for path in sorted(log.glob("metrics-*.jsonl")):
        for line in read_lines(path):
            numbers = {name: math.nan if value is None else value for name, value in line["data"].items()}
            merged.setdefault(line["step"], {}).update(numbers)
    return dict(sorted(merged.items()))


def seconds_trained(log: Path) -> float:
    """How long verl has run, all attempts together: each from its start to its last finished step."""
    attempts = [(path.stat().st_mtime, int(path.stem.rpartition("-")[2]) / 1e9) for path in log.glob("metrics-*.jsonl")]
    return sum(max(0.0, ended - started) for ended, started in attempts)


def valid_only(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The verdicts that say something: not lost to a service."""
    return [verdict for verdict in verdicts if verdict["valid"]]


def mean_parts(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """The mean of every number in the valid verdicts, by name."""
    values: dict[str, list[float]] = defaultdict(list)
    for verdict in valid_only(verdicts):
        for name, value in verdict.items():
            if name not in NOT_PARTS and isinstance(value, float | int):
                values[name].append(float(value))
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}

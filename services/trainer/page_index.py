"""What a run has written, found quickly: an index of its verdicts and metrics that follows the files as they grow.

In: the logs that the trainings of a run write (`records.py`, in scratch), or their published artifacts where scratch
is gone. Out: rollouts by filter, newest first, and the numbers of every finished step. What filters ask for is kept in
memory, about 1 kB a rollout; the rest stays in the files, which are only read. A file that is written anew, as at a
resume, has its training read again.
"""

import json
import math
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from services.trainer.records import REFUSALS, TRAIN, Verdict
from services.trainer.step_metrics import step_metrics

AT_ONCE = 500  # lines taken in while nobody else can ask
STEPS_AT_ONCE = 20
LONGEST_WORDS = 4000
SCHEMA = """
CREATE TABLE rollouts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER, role TEXT, split TEXT, step INTEGER, hop INTEGER, score REAL,
    valid INTEGER, solved TEXT, time REAL, began REAL, words TEXT, file TEXT, inode INTEGER, start INTEGER, size INTEGER
);
CREATE INDEX by_time ON rollouts (time DESC, id DESC);
CREATE INDEX by_step ON rollouts (round, role, split, step);
"""
COLUMNS = (
    "round", "role", "split", "step", "hop", "score", "valid", "solved", "time", "began", "words",
    "file", "inode", "start", "size",
)  # fmt: skip
INSERT = f"INSERT INTO rollouts ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608

Key = tuple[int, str]  # round and role
Cursor = tuple[float, int]  # time and id of the last rollout shown
Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A filter of rollouts; None and "" leave a field open."""

    round: int | None = None
    role: str = ""
    split: str = ""
    step: int | None = None
    hop: int | None = None
    low: float | None = None
    high: float | None = None
    valid: bool | None = None
    solved: str = ""  # never, sometimes, always, unasked
    text: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A rollout of the index, with its whole verdict."""

    id: int
    round: int
    role: str
    solved: str
    time: float
    verdict: Verdict


@dataclass
class Training:
    """How far the files of one training have been read."""

    read: dict[Path, tuple[int, int]] = field(default_factory=dict)  # file → inode and bytes
    metrics: dict[int, Numbers] = field(default_factory=dict)
    steps: dict[int, Numbers] = field(default_factory=dict)  # finished ones: verl's numbers and ours
    stale: set[int] = field(default_factory=set)  # steps whose numbers must be made again


class RunIndex:
    """The index of one run; `sync` is called by one thread, everything else by any."""

    def __init__(self, kept: Path, work: Path) -> None:
        self.version = 0  # grows with all that is taken in
        self._kept, self._work = kept, work
        self._lock = Lock()
        self._trainings: dict[Key, Training] = {}
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.executescript(SCHEMA)

    def sync(self) -> bool:
        """Take in some of what is new; whether there was anything. Call it until there is nothing."""
        changed = False
        for key, files in self._files().items():
            with self._lock:
                changed |= self._forget_rewritten(key, files)
                training = self._trainings.setdefault(key, Training())
                # Metrics first: a step's verdicts are written before its metrics, so none is missing below.
                changed |= self._read_metrics(training, [file for file in files if file.name.startswith("metrics")])
                taken = self._read_verdicts(key, training, [f for f in files if not f.name.startswith("metrics")])
            with self._lock:
                # A step that is numbered before its last verdict is read would have to be numbered again.
                changed |= taken > 0 or self._number_steps(key, training)
        self.version += changed
        return changed

    def trainings(self) -> list[Key]:
        """Rounds and roles that have written anything, in the order they run."""
        with self._lock:
            return sorted(key for key, training in self._trainings.items() if training.read)

    def steps(self, key: Key) -> dict[int, Numbers]:
        """The numbers of each finished step of a training, in order: verl's metrics and `step_metrics`."""
        with self._lock:
            return dict(sorted(self._trainings[key].steps.items())) if key in self._trainings else {}

    def rolled_out(self, key: Key, step: int) -> int:
        """Rollouts of a step of a training that have been judged so far."""
        question = "SELECT COUNT(*) FROM rollouts WHERE round = ? AND role = ? AND split = ? AND step = ?"
        with self._lock:
            return int(self._database.execute(question, (*key, TRAIN, step)).fetchone()[0])

    def find(self, wanted: Wanted, *, before: Cursor | None, limit: int) -> list[Found]:
        """Rollouts that fit, newest first, those before the cursor."""
        where, values = condition(wanted)
        if before is not None:
            where, values = f"{where} AND (time, id) < (?, ?)", [*values, *before]
        asked = f"SELECT * FROM rollouts WHERE {where} ORDER BY time DESC, id DESC LIMIT ?"  # noqa: S608
        with self._lock:
            rows = self._database.execute(asked, (*values, limit)).fetchall()
        return [found for row in rows if (found := whole(row)) is not None]

    def count(self, wanted: Wanted, *, after: int = 0) -> int:
        """How many rollouts fit; those that were taken in after the one with this id."""
        where, values = condition(wanted)
        asked = f"SELECT COUNT(*) FROM rollouts WHERE {where} AND id > ?"  # noqa: S608
        with self._lock:
            return int(self._database.execute(asked, (*values, after)).fetchone()[0])

    def newest(self) -> int:
        """The id of the rollout that was taken in last; 0 for none."""
        with self._lock:
            return int(self._database.execute("SELECT COALESCE(MAX(id), 0) FROM rollouts").fetchone()[0])

    def rollout(self, number: int) -> Found | None:
        """One rollout by its id, None when there is none."""
        with self._lock:
            row = self._database.execute("SELECT * FROM rollouts WHERE id = ?", (number,)).fetchone()
        return None if row is None else whole(row)

    def _files(self) -> dict[Key, list[Path]]:
        """The files of each training, its log's where there is one."""
        found: dict[Key, list[Path]] = {}
        for role in ("proposer", "solver"):
            for number in {
                int(p.name) for top in (self._kept, self._work) for p in top.glob("[0-9]*") if p.name.isdecimal()
            }:
                place = Path(str(number)) / role
                log = self._work / place / "log"
                files = [p for name in ("metrics-*", "verdicts-*") for p in sorted(log.glob(f"{name}.jsonl"))]
                published = (self._kept / place / "training").resolve()  # another version has other paths
                names = ("metrics", "rollouts", "held_out")
                files = files or [p for name in names if (p := published / f"{name}.jsonl").is_file()]
                if files:
                    found[number, role] = files
        for key in self._trainings.keys() - found.keys():
            found[key] = []
        return found

    def _forget_rewritten(self, key: Key, files: Sequence[Path]) -> bool:
        """Forget a training of which a file is gone, another or shorter than what was read of it."""
        training = self._trainings.get(key)
        if training is None:
            return False
        there = {file: file.stat() for file in files if file.exists()}
        for file, (inode, read) in training.read.items():
            if file not in there or there[file].st_ino != inode or there[file].st_size < read:
                self._database.execute("DELETE FROM rollouts WHERE round = ? AND role = ?", key)
                self._trainings[key] = Training()
                return True
        return False

    def _read_metrics(self, training: Training, files: Sequence[Path]) -> bool:
        changed = False
        for file in files:
            for line, _, _ in new_lines(file, training.read, AT_ONCE):
                values = line.get("data", line)
                numbers = {
                    name: math.nan if value is None else value for name, value in values.items() if name != "step"
                }
                training.metrics.setdefault(line["step"], {}).update(numbers)
                training.stale.add(line["step"])
                changed = True
        return changed

    def _read_verdicts(self, key: Key, training: Training, files: Sequence[Path]) -> int:
        """How many verdicts were taken in."""
        refused = refusals(files)
        rows: list[tuple[Any, ...]] = []
        for file in files:
            for verdict, start, size in new_lines(file, training.read, AT_ONCE - len(rows)):
                with suppress(KeyError, TypeError, ValueError):  # a line that another version of this has written
                    rows.append((*key, *described(verdict), str(file), training.read[file][0], start, size))
                    if verdict["split"] == TRAIN:
                        training.stale.add(verdict["step"])
        self._database.executemany(INSERT, rows)
        for step, moment in refused.items():
            gone = self._database.execute(
                "DELETE FROM rollouts WHERE round = ? AND role = ? AND split = ? AND step = ? AND began <= ?",
                (*key, TRAIN, step, moment),
            )
            if gone.rowcount:
                training.stale.add(step)
        return len(rows)

    def _number_steps(self, key: Key, training: Training) -> bool:
        """Make the numbers of some finished steps."""
        ready = sorted(s for s in training.stale if "timing_s/step" in training.metrics.get(s, {}))[:STEPS_AT_ONCE]
        for step in ready:
            asked = "SELECT * FROM rollouts WHERE round = ? AND role = ? AND split = ? AND step = ?"
            rows = self._database.execute(asked, (*key, TRAIN, step)).fetchall()
            verdicts = [found.verdict for row in rows if (found := whole(row)) is not None]
            training.steps[step] = training.metrics[step] | step_metrics(verdicts)
            training.stale.discard(step)
        return bool(ready)


def condition(wanted: Wanted) -> tuple[str, list[Any]]:
    """The filter as SQL with its values; of the text every word must be there."""
    words = wanted.text.casefold().split()
    tests: list[tuple[str, Any]] = [
        ("round = ?", wanted.round),
        ("role = ?", wanted.role or None),
        ("split = ?", wanted.split or None),
        ("step = ?", wanted.step),
        ("hop = ?", wanted.hop),
        ("score >= ?", wanted.low),
        ("score <= ?", wanted.high),
        ("valid = ?", wanted.valid),
        ("solved = ?", wanted.solved or None),
        *(("instr(words, ?) > 0", word) for word in words),
    ]
    given = [(test, value) for test, value in tests if value is not None]
    return " AND ".join(test for test, _ in given) or "1", [value for _, value in given]


def new_lines(file: Path, read: dict[Path, tuple[int, int]], most: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Whole lines of a file that have not been read, each with its place and size; `read` goes along."""
    with file.open("rb") as stream:
        inode, start = read.get(file, (file.stat().st_ino, 0))
        read[file] = inode, start
        stream.seek(start)
        for _, line in zip(range(most), stream, strict=False):
            if not line.endswith(b"\n"):
                return
            read[file] = inode, start + len(line)
            with suppress(ValueError):  # a line that a full disk has cut off, and a later one went on
                yield json.loads(line), start, len(line)
            start += len(line)


def refusals(files: Sequence[Path]) -> dict[int, float]:
    """When a step of this log was refused last, see records.py; what had begun before does not count."""
    places = {file.parent / REFUSALS for file in files}
    lines = [line for place in places if place.is_file() for line in new_lines(place, {}, 10**9)]
    return {line["step"]: line["time"] for line, _, _ in lines}


def described(verdict: Verdict) -> tuple[Any, ...]:
    """The columns of a verdict, from its split to its words."""
    queries = [query for search in verdict["searches"] for query in search["queries"]]
    texts = [verdict["pmid"], verdict["question"], verdict["answer"], verdict.get("gold", ""), *queries]
    return (
        verdict["split"],
        verdict["step"],
        verdict["hop"],
        float(verdict["score"]),
        int(bool(verdict.get("valid", True))),
        solved(verdict),
        verdict["time"],
        verdict.get("began", verdict["time"]),
        "\n".join(map(str, texts)).casefold()[:LONGEST_WORDS],
    )


def solved(verdict: Verdict) -> str:
    """How often a question was answered rightly: by its attempts, or by the rollout itself in the solver's training."""
    if "exact_match" in verdict:
        return "always" if verdict["exact_match"] else "never"
    right, judged = verdict.get("attempts_correct", 0), verdict.get("attempts_valid", 0)
    if not judged:
        return "unasked"
    return "never" if right == 0 else "always" if right == judged else "sometimes"


def whole(row: Sequence[Any]) -> Found | None:
    """A row of the index with its verdict from the file; None when the file is no longer the one that was read."""
    number, values = row[0], dict(zip(COLUMNS, row[1:], strict=True))
    try:
        with Path(values["file"]).open("rb") as stream:
            if os.fstat(stream.fileno()).st_ino != values["inode"]:
                return None
            stream.seek(values["start"])
            line = stream.read(values["size"])
        return Found(number, values["round"], values["role"], values["solved"], values["time"], json.loads(line))
    except (OSError, ValueError):
        return None

"""What earlier steps of the run have asked, read from the verdicts that the reward workers append.

Only questions of earlier steps count, so that a reward does not depend on which rollout of a step happens to end first.
"""

import json
from collections import defaultdict
from pathlib import Path


class RecentQuestions:
    """The questions of the training steps so far, read incrementally; one object per reward worker and run."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read: dict[Path, int] = defaultdict(int)
        self._by_step: dict[int, list[tuple[int, str]]] = defaultdict(list)
        self._step = -1
        self._window: list[str] = []

    def before(self, step: int, count: int) -> list[str]:
        """The last `count` questions of the steps before `step`."""
        if step != self._step:
            for path in sorted(self._log.glob("verdicts-*.jsonl")):
                self._read_on(path)
            questions = [q for s in sorted(self._by_step) if s < step for _, q in sorted(self._by_step[s])]
            self._step, self._window = step, questions[-count:]
        return self._window

    def _read_on(self, path: Path) -> None:
        with path.open("rb") as stream:
            stream.seek(self._read[path])
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                self._read[path] += len(line)
                verdict = json.loads(line)
                if verdict["split"] == "train" and verdict["question"]:
                    self._by_step[verdict["step"]].append((verdict["index"], verdict["question"]))

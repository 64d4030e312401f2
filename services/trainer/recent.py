"""What earlier steps of the run have asked, read from the verdicts that the reward workers append.

Only questions of earlier steps count, so that a reward does not depend on which rollout of a step happens to end first.
"""

from collections import defaultdict
from pathlib import Path

from services.trainer.records import TRAIN, VerdictTail


class RecentQuestions:
    """The questions of the training steps so far, read incrementally; one object per reward worker and run."""

    def __init__(self, log: Path) -> None:
        self._tail = VerdictTail(log)
        self._by_step: dict[int, list[tuple[int, str]]] = defaultdict(list)
        self._step = -1
        self._window: list[str] = []

    def before(self, step: int, count: int) -> list[str]:
        """The last `count` questions of the steps before `step`."""
        if step != self._step:
            for verdict in self._tail.new():
                if verdict["split"] == TRAIN and verdict["question"]:
                    self._by_step[verdict["step"]].append((verdict["index"], verdict["question"]))
            questions = [q for s in sorted(self._by_step) if s < step for _, q in sorted(self._by_step[s])]
            self._step, self._window = step, questions[-count:]
        return self._window

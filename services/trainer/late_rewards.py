"""Rewards that are still being made while the batch they belong to is worked on: the trainer's side.

A training rollout reaches verl the moment it is generated, with `reward.PENDING` for a reward, and its attempts go on
in the reward worker. Meanwhile the trainer computes log-probabilities; then it waits here for the verdicts, which come
through the run's log. So the reward costs a step only what lasts longer than both generation and log-probabilities.

The verdict of a worker that has died does not come: after the longest time that a question may take, the trainer
judges such a rollout itself. An error of the reward's own code ends the training with that error.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.trainer.paths import run_paths
from services.trainer.records import TRAIN, Verdict, VerdictTail, first_defect
from services.trainer.reward import in_own_loop, make_judging, score_and_log
from shared.settings import Settings

POLL_S = 0.05
GRACE_S = 60.0  # that a verdict may need beyond the deadline of its question


@dataclass(frozen=True, slots=True)
class Rollout:
    """What judging a rollout takes: verl's data source, our trajectory, and the seed's `extra_info`."""

    data_source: str
    trajectory: dict[str, Any]
    info: dict[str, Any]


class LateRewards:
    """The verdicts of one training, by rollout."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._log = run_paths(settings).log
        self._tail = VerdictTail(self._log)
        self._longest_s = settings.trainer.reward.question_deadline_s + GRACE_S

    def wait(self, rollouts: Mapping[str, Rollout]) -> dict[str, Verdict]:
        """The verdict of each rollout, by its name; RuntimeError with what the reward's code met, if it did."""
        found: dict[str, Verdict] = {}
        give_up = time.monotonic() + self._longest_s
        while True:
            for verdict in self._tail.new():
                if verdict["split"] == TRAIN and verdict.get("rollout") in rollouts:
                    found[verdict["rollout"]] = verdict
            missing = {name: rollout for name, rollout in rollouts.items() if name not in found}
            if not missing:
                return found
            if defect := first_defect(self._log):
                raise RuntimeError(f"a rollout could not be judged:\n{defect}")
            if time.monotonic() > give_up:
                return found | self.judge(missing)
            time.sleep(POLL_S)

    def judge(self, rollouts: Mapping[str, Rollout]) -> dict[str, Verdict]:
        """Judge rollouts in this process, all at once; their verdicts are in the log then."""

        async def judge_all() -> list[Verdict]:
            judging = make_judging(self._settings)

            work = [score_and_log(r.data_source, r.trajectory, r.info, judging) for r in rollouts.values()]
            try:
                return [verdict for _, verdict in await asyncio.gather(*work)]
            finally:
                await judging.close()

        return dict(zip(rollouts, in_own_loop(judge_all()), strict=True))

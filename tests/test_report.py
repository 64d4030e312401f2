"""The report's tables of a run: where the steps' time went, and how far rollouts and training differed."""

from typing import Any

import pytest

from services.trainer.report import MISMATCHES, TIMES, mismatch_rows, time_rows
from services.trainer.step_metrics import MISMATCH, PART_TIMERS

STEPS: list[dict[str, Any]] = [
    {"step": 1, "timing_s/step": 10.0, "timing_s/gen": 4.0, "timing_s/update_actor": 5.0, "rollout_corr/kl": 0.25},
    {"step": 2, "timing_s/step": 30.0, "timing_s/gen": 12.0, "timing_s/update_actor": 9.0, "timing_s/testing": 8.0}
    | {"timing_s/save_checkpoint": 4.0, "rollout_corr/kl": None},
]


def test_each_part_has_its_mean_its_share_and_its_seconds_per_step() -> None:
    rows = {label: row for label, *row in time_rows(STEPS)}
    assert rows["update"] == [7.0, pytest.approx(14 / 40), [5.0, 9.0]]
    assert rows["whole step"] == [20.0, 1.0, [10.0, 30.0]]
    # A part that not every step has still counts for all of them.
    assert rows["checkpoint"] == [2.0, 0.1, [None, 4.0]]
    assert "log-probabilities" not in rows
    shares: list[Any] = [row[1] for label, row in rows.items() if not label.startswith(("whole", "validation"))]
    assert sum(shares) == pytest.approx(1)


def test_the_mismatch_is_shown_step_by_step() -> None:
    [(label, values)] = mismatch_rows(STEPS)
    assert label.startswith("KL")
    assert values == [0.25, None]


def test_a_run_without_timed_steps_has_empty_tables() -> None:
    assert time_rows([]) == []
    assert mismatch_rows([]) == []


def test_every_part_and_measure_has_a_label() -> None:
    own = {"other", "step", "validation"}
    assert {name for name, _ in TIMES} == own | PART_TIMERS.keys()
    assert {name for name, _ in MISMATCHES} == set(MISMATCH)

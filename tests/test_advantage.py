"""Advantages worked by hand, and what must hold for any batch."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.advantage import flat_groups, grpo_advantages, hrpo_advantages, standardised

SMALL = {"small_group": 2, "small_group_rule": "batch"}
ROOT_HALF = math.sqrt(0.5)


def close(values: list[float], expected: list[float]) -> bool:
    return values == pytest.approx(expected, abs=1e-4)


def test_a_mixed_batch_is_compared_within_each_hop() -> None:
    # hop 1: mean 0.5, unbiased std 0.5; hop 2: mean 1.0, std 0.7071
    rewards, hops = [0.0, 1.5, 0.5, 0.5, 1.0], [1, 2, 1, 2, 1]
    assert close(hrpo_advantages(rewards, hops, [True] * 5, **SMALL), [-1, ROOT_HALF, 0, -ROOT_HALF, 1])


def test_a_group_of_one_borrows_the_statistics_of_the_batch_and_never_keeps_its_reward() -> None:
    # all three: mean 0.8333, unbiased std 0.7638
    advantages = hrpo_advantages([0.0, 1.0, 1.5], [1, 1, 4], [True] * 3, **SMALL)
    assert close(advantages, [-ROOT_HALF, ROOT_HALF, 0.8729])
    assert hrpo_advantages([0.0, 1.0, 1.5], [1, 1, 4], [True] * 3, small_group=2, small_group_rule="zero")[2] == 0


def test_a_batch_of_one_teaches_nothing() -> None:
    assert hrpo_advantages([1.5], [4], [True], **SMALL) == [0]
    assert grpo_advantages([1.5], ["a"], [True]) == [0]


def test_a_group_below_the_set_size_borrows_too() -> None:
    rewards, hops = [0.0, 1.0, 0.0, 1.0, 1.0], [1, 1, 1, 2, 2]
    kept = hrpo_advantages(rewards, hops, [True] * 5, small_group=3, small_group_rule="batch")
    assert close(kept, [*standardised([0.0, 1.0, 0.0]), *standardised(rewards)[3:]])


def test_invalid_rollouts_are_in_no_statistic() -> None:
    rewards, hops, valid = [0.0, 0.0, 1.0, 9.0], [1, 1, 1, 1], [True, False, True, False]
    assert close(hrpo_advantages(rewards, hops, valid, **SMALL), [-ROOT_HALF, 0, ROOT_HALF, 0])
    assert close(grpo_advantages(rewards, ["p"] * 4, valid), [-ROOT_HALF, 0, ROOT_HALF, 0])


def test_a_group_left_with_one_valid_rollout_borrows_as_well() -> None:
    advantages = hrpo_advantages([0.0, 1.0, 1.5, 0.5], [1, 1, 4, 4], [True, True, True, False], **SMALL)
    assert close(advantages, [-ROOT_HALF, ROOT_HALF, 0.8729, 0])


def test_equal_rewards_give_no_advantage() -> None:
    assert hrpo_advantages([0.5] * 4, [1, 1, 2, 2], [True] * 4, **SMALL) == [0] * 4
    assert grpo_advantages([0.3] * 3, [1, 1, 1], [True] * 3) == pytest.approx([0] * 3, abs=1e-9)


def test_grpo_compares_within_a_prompt() -> None:
    assert close(grpo_advantages([0.0, 1.0, 1.0, 1.0], ["a", "b", "a", "b"], [True] * 4), [-ROOT_HALF, 0, ROOT_HALF, 0])


def test_flat_groups_are_counted_among_those_with_valid_rollouts() -> None:
    advantages = grpo_advantages([0.0, 1.0, 1.0, 1.0, 9.0], [1, 1, 2, 2, 3], [True, True, True, True, False])
    assert flat_groups(advantages, [1, 1, 2, 2, 3], [True, True, True, True, False]) == (2, 1)


samples = st.lists(st.tuples(st.floats(0, 1.5), st.integers(1, 4), st.booleans()), min_size=1, max_size=40)


def estimate(estimator: str, rows: list[tuple[float, int, bool]]) -> list[float]:
    rewards, groups, valid = (list(column) for column in zip(*rows, strict=True))
    if estimator == "grpo":
        return grpo_advantages(rewards, groups, valid)
    return hrpo_advantages(rewards, groups, valid, small_group=3, small_group_rule="batch")


@pytest.mark.parametrize("estimator", ["grpo", "hrpo"])
@given(rows=samples, seed=st.integers(0, 1000))
def test_permuting_a_batch_permutes_its_advantages(
    estimator: str, rows: list[tuple[float, int, bool]], seed: int
) -> None:
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)  # noqa: S311
    plain, shuffled = estimate(estimator, rows), estimate(estimator, [rows[i] for i in order])
    assert shuffled == pytest.approx([plain[i] for i in order], abs=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "hrpo"])
@given(rows=samples)
def test_the_advantages_of_a_valid_group_sum_to_zero(estimator: str, rows: list[tuple[float, int, bool]]) -> None:
    advantages = estimate(estimator, rows)
    for group in range(1, 5):
        inside = [a for a, (_, g, ok) in zip(advantages, rows, strict=True) if g == group and ok]
        if len(inside) >= 3:
            assert math.fsum(inside) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("estimator", ["grpo", "hrpo"])
@given(rows=samples, reward=st.floats(0, 1.5), group=st.integers(1, 4))
def test_an_invalid_sample_changes_nobody_elses_advantage(
    estimator: str, rows: list[tuple[float, int, bool]], reward: float, group: int
) -> None:
    assert estimate(estimator, [*rows, (reward, group, False)]) == [*estimate(estimator, rows), 0.0]


@given(rows=samples)
def test_no_raw_reward_ever_becomes_an_advantage(rows: list[tuple[float, int, bool]]) -> None:
    valid = sum(ok for *_, ok in rows)
    bound = math.sqrt(max(valid - 1, 0)) + 1e-6  # no value lies further from the mean, in units of the unbiased std
    assert all(abs(advantage) <= bound for advantage in estimate("hrpo", rows))

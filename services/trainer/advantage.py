"""Rewards of a batch → advantages: pure functions of plain lists.

`grpo` compares the rollouts of one prompt (arXiv 2402.03300), `hrpo` those of one hop number across the batch (Eq. 3 of
arXiv 2601.07055): A = (r − mean) / (std + 1e-6), with the unbiased standard deviation, as in the released code. An
invalid rollout (lost to a service) has advantage 0 and is in no statistic. A group that is too small never keeps its
raw reward.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

DELTA = 1e-6


def grpo_advantages(rewards: Sequence[float], groups: Sequence[Hashable], valid: Sequence[bool]) -> list[float]:
    """Advantages within groups of the same prompt; 0 in a group with fewer than two valid rollouts."""
    advantages = [0.0] * len(rewards)
    for rows in _groups(groups, valid).values():
        for row, value in zip(rows, standardised([rewards[row] for row in rows]), strict=True):
            advantages[row] = value
    return advantages


def hrpo_advantages(
    rewards: Sequence[float], hops: Sequence[int], valid: Sequence[bool], *, small_group: int, small_group_rule: str
) -> list[float]:
    """Advantages within hop groups of the batch.

    A hop with fewer than `small_group` valid rollouts is compared with all valid rollouts of the batch
    (`small_group_rule` "batch"), or gets 0 ("zero").
    """
    advantages = [0.0] * len(rewards)
    whole_batch = [row for row, ok in enumerate(valid) if ok]
    against_batch = dict(zip(whole_batch, standardised([rewards[row] for row in whole_batch]), strict=True))
    for rows in _groups(hops, valid).values():
        if len(rows) >= max(small_group, 2):
            values = standardised([rewards[row] for row in rows])
        else:
            values = [against_batch[row] if small_group_rule == "batch" else 0.0 for row in rows]
        for row, value in zip(rows, values, strict=True):
            advantages[row] = value
    return advantages


def standardised(values: Sequence[float]) -> list[float]:
    """(v − mean) / (std + 1e-6) with the unbiased std; zeros for fewer than two values."""
    if len(values) < 2:
        return [0.0] * len(values)
    mean = math.fsum(values) / len(values)
    deviations = [value - mean for value in values]
    std = math.sqrt(math.fsum(d * d for d in deviations) / (len(values) - 1))
    return [deviation / (std + DELTA) for deviation in deviations]


def flat_groups(advantages: Sequence[float], groups: Sequence[Hashable], valid: Sequence[bool]) -> tuple[int, int]:
    """How many groups have valid rollouts, and how many of those teach nothing because all advantages are 0."""
    found = _groups(groups, valid)
    return len(found), sum(all(abs(advantages[row]) < DELTA for row in rows) for rows in found.values())


def _groups(keys: Sequence[Hashable], valid: Sequence[bool]) -> dict[Hashable, list[int]]:
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, (key, ok) in enumerate(zip(keys, valid, strict=True)):
        if ok:
            rows[key].append(row)
    return rows

"""What can go wrong in a training, seen in its metrics: alarms for the newest step, with measure, bound and remedy.

Pure functions over a run's metrics by step: verl's own names, `drzero/…` of the trainer's advantage, and the names of
`step_metrics.py`. `None` is a number that is not finite, as verl's log writes it. A step without a measure says nothing
about it: it raises no alarm, and it neither breaks nor lengthens a streak.

`loss` ends the run at once: the forward pass itself is broken, and each further rollout would be wasted. `gradient`
warns first, because verl leaves out an update whose norm is not finite, so the weights are still good; it and
`entropy`, `length`, `reward` and `repeats` end the run after `steps` bad steps in a row. `refused` and `flat` never do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shared.settings import GuardSettings

History = Mapping[int, Mapping[str, float | None]]
Findings = dict[int, str]  # measured step → what is wrong with it, or ""

NAMES = ("loss", "gradient", "entropy", "length", "reward", "repeats", "refused", "flat")
NEVER_FATAL = frozenset({"refused", "flat"})
FIRST_STEPS = 5  # steps that set the usual response length
WINDOW = 5  # steps of one mean reward: the best single step of a small batch is luck
MEANINGFUL_REWARD = 0.05  # a fall from less than this is noise


@dataclass(frozen=True, slots=True)
class Alarm:
    """One thing that is wrong at the newest step: since which step, for how many steps, and whether to stop."""

    name: str
    step: int  # first bad step of the present streak
    streak: int
    fatal: bool
    text: str


def alarms(history: History, settings: GuardSettings) -> list[Alarm]:
    """Alarms of the newest step of `history`, whose order does not matter; none for an empty history."""
    steps = dict(sorted(history.items()))
    checks = {
        "loss": (broken_losses(steps), 1),
        "gradient": (broken_gradients(steps), settings.steps),
        "entropy": (collapsed_entropy(steps, settings.min_entropy), settings.steps),
        "length": (exploded_length(steps, settings.max_length_growth), settings.steps),
        "reward": (collapsed_reward(steps, settings.min_reward_share), settings.steps),
        "repeats": (repeated_questions(steps, settings.max_repeated_share), settings.steps),
        "refused": (refused_batches(steps), None),
        "flat": (flat_groups(steps), None),
    }
    raised = []
    for name, (findings, fatal_at) in checks.items():
        streak = bad_streak(findings, newest=max(steps, default=0))
        if len(streak) >= (settings.flat_steps if name == "flat" else 1):
            fatal = fatal_at is not None and len(streak) >= fatal_at
            text = f"{findings[streak[-1]]} [{_since(streak)}{_ending(fatal, fatal_at)}]"
            raised.append(Alarm(name, streak[0], len(streak), fatal, text))
    return raised


def last_good_step(alarms: list[Alarm]) -> int:
    """The step before the first bad one, whose checkpoint is worth keeping; `refused` and `flat` harm no weights.

    Raises ValueError when no alarm can end the run.
    """
    harmful = [alarm.step for alarm in alarms if alarm.name not in NEVER_FATAL]
    if not harmful:
        raise ValueError("expected an alarm that can end the run, got none; ask only while one is raised")
    return min(harmful) - 1


def bad_streak(findings: Findings, *, newest: int) -> list[int]:
    """The bad steps in a row that end with step `newest`; empty when it is good or not measured."""
    streak: list[int] = []
    for step in sorted(findings):
        if findings[step]:
            streak.append(step)
        else:
            streak.clear()
    return streak if streak and streak[-1] == newest else []


def broken_losses(history: History) -> Findings:
    """Steps whose loss is not finite."""
    return _not_finite(
        history,
        ("actor/loss", "actor/pg_loss"),
        "the forward pass is broken: lower DRZERO_TRAINER__ACTOR__LEARNING_RATE or set "
        "DRZERO_TRAINER__ACTOR__DTYPE=float32",
    )


def broken_gradients(history: History) -> Findings:
    """Steps with an update that verl has left out, because the norm of its gradient is not finite."""
    return _not_finite(
        history,
        ("actor/grad_norm",),
        "verl has left out such updates: lower DRZERO_TRAINER__ACTOR__LEARNING_RATE or set "
        "DRZERO_TRAINER__ACTOR__DTYPE=float32",
    )


def collapsed_entropy(history: History, bound: float) -> Findings:
    """Steps whose mean token entropy is under the bound: the policy says one thing only."""
    remedy = (
        "raise DRZERO_TRAINER__TEMPERATURE or lower DRZERO_TRAINER__ACTOR__LEARNING_RATE "
        "(bound: DRZERO_TRAINER__GUARDS__MIN_ENTROPY)"
    )
    return {
        step: f"actor/entropy is {value:.4g} nats at step {step}, less than {bound:g}: {remedy}"
        if value < bound
        else ""
        for step, value in measured(history, "actor/entropy").items()
    }


def exploded_length(history: History, growth: float) -> Findings:
    """Steps whose mean response is over `growth` times as long as in the first steps, which are good by definition."""
    lengths = measured(history, "response_length/mean")
    first = list(lengths.values())[:FIRST_STEPS]
    if len(first) < FIRST_STEPS:
        return {}
    usual = sum(first) / FIRST_STEPS
    bound = f"more than {growth:g} times the {usual:.0f} of the first {FIRST_STEPS} steps"
    remedy = (
        "lower DRZERO_TRAINER__TURN_TOKENS or DRZERO_TRAINER__ACTOR__LEARNING_RATE "
        "(bound: DRZERO_TRAINER__GUARDS__MAX_LENGTH_GROWTH)"
    )
    return {
        step: f"response_length/mean is {value:.0f} tokens at step {step}, {bound}: {remedy}"
        if value > growth * usual
        else ""
        for step, value in list(lengths.items())[FIRST_STEPS:]
    }


def collapsed_reward(history: History, share: float) -> Findings:
    """Steps whose mean reward is under `share` of the best mean of `WINDOW` earlier steps, if that is meaningful."""
    remedy = (
        "lower DRZERO_TRAINER__ACTOR__LEARNING_RATE and read the newest rollouts "
        "(bound: DRZERO_TRAINER__GUARDS__MIN_REWARD_SHARE)"
    )
    findings: Findings = {}
    earlier: list[float] = []
    best = 0.0
    for step, value in rewards(history).items():
        bad = best >= MEANINGFUL_REWARD and value < share * best
        findings[step] = (
            f"the mean reward is {value:.3f} at step {step}, less than {share:g} of {best:.3f}, the best mean of "
            f"{WINDOW} steps: {remedy}"
            if bad
            else ""
        )
        earlier.append(value)
        if len(earlier) >= WINDOW:
            best = max(best, sum(earlier[-WINDOW:]) / WINDOW)
    return findings


def repeated_questions(history: History, bound: float) -> Findings:
    """Steps in which most questions are also asked about another paper: they pay whatever the paper says."""
    remedy = (
        "set DRZERO_TRAINER__REWARD__VARIANT=biomedical, which pays difficulty only for answers from the papers read, "
        "or lower DRZERO_TRAINER__ACTOR__LEARNING_RATE (bound: DRZERO_TRAINER__GUARDS__MAX_REPEATED_SHARE)"
    )
    return {
        step: f"{value:.0%} of the questions of step {step} are asked about several papers, at most {bound:.0%} "
        f"expected: {remedy}"
        if value > bound
        else ""
        for step, value in measured(history, "repeated_share").items()
    }


def refused_batches(history: History) -> Findings:
    """Steps whose batch was refused and made again, because too many rollouts were lost to services."""
    remedy = (
        "look at the solver's and the search's log (bounds: DRZERO_TRAINER__MAX_INVALID_SHARE, "
        "DRZERO_TRAINER__MAX_REFUSALS)"
    )
    return {
        step: f"{value:.0f} batches of step {step} were refused, 0 expected: {remedy}" if value > 0 else ""
        for step, value in measured(history, "drzero/refused").items()
    }


def flat_groups(history: History) -> Findings:
    """Steps in which no group had any variance of reward, so that nothing could be learned."""
    groups, flat = measured(history, "drzero/groups"), measured(history, "drzero/groups_flat")
    remedy = (
        "set DRZERO_TRAINER__REWARD__FORMAT_FORM=graded, show DRZERO_TRAINER__WORKED_EXAMPLES, raise "
        "DRZERO_TRAINER__TEMPERATURE or DRZERO_TRAINER__ROLLOUTS_PER_PROMPT "
        "(bound: DRZERO_TRAINER__GUARDS__FLAT_STEPS)"
    )
    return {
        step: f"all {groups[step]:.0f} groups of step {step} are flat, at least 1 with different rewards expected: "
        f"nothing is learned: {remedy}"
        if flat[step] >= groups[step]
        else ""
        for step in groups.keys() & flat.keys()
        if groups[step] > 0
    }


def measured(history: History, key: str) -> dict[int, float]:
    """The finite values of one metric by step, in order."""
    values = {step: numbers[key] for step, numbers in sorted(history.items()) if key in numbers}
    return {step: value for step, value in values.items() if value is not None and math.isfinite(value)}


def rewards(history: History) -> dict[int, float]:
    """Mean reward by step: of the valid rollouts where it is known, else verl's own mean.

    Steps before the gate of the format score closed (`drzero/gated`) are left out: there the same rollouts earn more.
    """
    newest = history[max(history)] if history else {}
    alike = {step: numbers for step, numbers in history.items() if _gated(numbers) == _gated(newest)}
    # verl's mean counts rollouts that were lost to a service: a step without any valid one would look like a collapse.
    without_ours = {step: numbers for step, numbers in alike.items() if "invalid_share" not in numbers}
    ours, verls = measured(alike, "score_mean"), measured(without_ours, "critic/score/mean")
    return dict(sorted((verls | ours).items()))


def _gated(numbers: Mapping[str, float | None]) -> bool:
    return bool(numbers.get("drzero/gated"))


def _not_finite(history: History, keys: tuple[str, ...], remedy: str) -> Findings:
    findings: Findings = {}
    for step, numbers in history.items():
        present = {key: numbers[key] for key in keys if key in numbers}
        broken = [key for key, value in present.items() if value is None or not math.isfinite(value)]
        if present:
            what = f"{' and '.join(broken)} not finite at step {step}, a finite number expected; {remedy}"
            findings[step] = what if broken else ""
    return findings


def _since(streak: list[int]) -> str:
    return f"step {streak[0]}" if len(streak) == 1 else f"{len(streak)} steps in a row, since step {streak[0]}"


def _ending(fatal: bool, fatal_at: int | None) -> str:
    if fatal_at is None:
        return ""
    return "; training stops" if fatal else f"; training stops after {fatal_at}"

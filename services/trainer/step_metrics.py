"""The verdicts of one step → its numbers by flat name, and the lines that a reader of the console sees.

Pure. A verdict is one line of the reward's log. A rollout that was lost to a service or a deadline is invalid: it is
counted, but no mean knows it. Names with a slash belong to a family (`solved/2`, `hop/3/score_mean`). Numbers that
stand for nothing are left out: no verdicts give {}, invalid ones alone give only counts and times.

`step_times` and `mismatch` read verl's own numbers of the step.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import fmean, stdev

import numpy as np

from services.trainer.matching import normalise
from services.trainer.records import Verdict, valid_only

PARTS = frozenset({
    "score", "format", "difficulty", "bonus", "citations", "genes", "reasoning", "novelty",
    "exact_match", "biomedical_match", "answered",  # of the solver's own training
})  # fmt: skip
REWARD_TAIL = "seconds/reward_tail"
PART_TIMERS = {
    "generation": "timing_s/gen",
    "reward": "timing_s/reward",
    "log_probs": "timing_s/old_log_prob",
    "advantage": "timing_s/adv",
    "update": "timing_s/update_actor",
    "weights": "timing_s/update_weights",
    "checkpoint": "timing_s/save_checkpoint",
}
MISMATCH = {
    "correlation": "training/rollout_actor_probs_pearson_corr",
    "mean_difference": "training/rollout_probs_diff_mean",
    "largest_difference": "training/rollout_probs_diff_max",
    "kl": "rollout_corr/kl",
    "k3_kl": "rollout_corr/k3_kl",
}
ENOUGH_QUESTIONS = 8  # of a step, before repeats among them say something
LONGEST_TEXT = 200
LONGEST_ANSWER = 60


def step_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """All numbers of a step's verdicts, invalid ones among them; {} for none."""
    if not verdicts:
        return {}
    valid = valid_only(verdicts)
    return {
        **work(verdicts),
        **times(verdicts),
        **means(valid),
        **by_hop(valid),
        **solved(valid),
        **wording(valid),
    }


def work(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Counts of rollouts, searches, broken calls and attempts. `searches_made` brought papers, failed ones did not."""
    reasons = Counter(verdict["invalid_reason"] for verdict in verdicts if not verdict["valid"])
    broken: Counter[str] = Counter()
    for verdict in verdicts:
        broken.update(verdict["calls_broken"])
    ended = Counter(attempt["ended"] for verdict in verdicts for attempt in verdict["attempts"])
    return {
        "rollouts": float(len(verdicts)),
        "invalid_share": reasons.total() / len(verdicts),
        "searches_made": float(sum(verdict["searches_made"] for verdict in verdicts)),
        "searches_failed": float(sum(verdict["calls_failed"] for verdict in verdicts)),
        **_family("invalid", reasons),
        **_family("calls_broken", broken),
        **_family("ended", ended),
    }


def times(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Median, 95th percentile and maximum of some seconds, and the step's `reward_tail`.

    Of each attempt and of all attempts at a question together; of what each rollout generated and searched.
    """
    seconds = {
        "attempt": attempt_seconds(verdicts),
        "question": [float(verdict["seconds_attempts"]) for verdict in verdicts if verdict["attempts"]],
        "generation": [float(verdict["seconds_generating"]) for verdict in verdicts if "seconds_generating" in verdict],
        "search": [float(verdict["seconds_searching"]) for verdict in verdicts if "seconds_searching" in verdict],
    }
    spread = {
        f"seconds/{what}/{name}": float(value)
        for what, values in seconds.items()
        if values
        for name, value in zip(("p50", "p95", "max"), np.quantile(values, (0.5, 0.95, 1.0)), strict=True)
    }
    return spread | reward_tail(verdicts)


def reward_tail(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """How long the last verdict came after the last rollout was generated; log-probabilities are computed meanwhile.

    {} when no verdict says when its rollout was generated.
    """
    pairs = [(float(verdict["time"]), float(verdict["generated"])) for verdict in verdicts if "generated" in verdict]
    if not pairs:
        return {}
    judged, generated = map(max, zip(*pairs, strict=True))
    return {REWARD_TAIL: max(0.0, judged - generated)}


def step_times(verls: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step by part, from verl's metrics; {} when verl has timed no step.

    `generation` ends with the last rollout, searches among it; `reward` is what the trainer then waits for verdicts, in
    verl's timer of the advantage. `other` is what nothing else accounts for. All sum to the step; `validation` comes
    after it.
    """
    if "timing_s/step" not in verls:
        return {}
    seconds = {part: verls[timer] for part, timer in PART_TIMERS.items() if timer in verls}
    if "reward" in seconds and "advantage" in seconds:
        seconds["advantage"] = max(0.0, seconds["advantage"] - seconds["reward"])
    seconds["other"] = max(0.0, verls["timing_s/step"] - sum(seconds.values()))
    if "timing_s/testing" in verls:
        seconds["validation"] = verls["timing_s/testing"]
    return seconds


def mismatch(verls: Mapping[str, float]) -> dict[str, float]:
    """How far the trained model's probabilities of the sampled tokens are from those the rollout engine drew with."""
    return {name: verls[key] for name, key in MISMATCH.items() if key in verls}


def means(valid: Sequence[Verdict]) -> dict[str, float]:
    """Mean of each reward part over the valid rollouts that have it, and the best score and format."""
    values: dict[str, list[float]] = defaultdict(list)
    for verdict in valid:
        for name in verdict:
            if name in PARTS or name.startswith("format_"):
                values[name].append(float(verdict[name]))
    averages = {f"{name}_mean": fmean(numbers) for name, numbers in values.items()}
    return averages | {f"{name}_max": max(values[name]) for name in ("score", "format") if name in values}


def by_hop(valid: Sequence[Verdict]) -> dict[str, float]:
    """Number, mean score and its unbiased standard deviation (0 for one), which HRPO divides by, of each hop."""
    scores: dict[int, list[float]] = defaultdict(list)
    for verdict in valid:
        scores[verdict["hop"]].append(float(verdict["score"]))
    numbers: dict[str, float] = {}
    for hop, values in sorted(scores.items()):
        numbers[f"hop/{hop}/count"] = float(len(values))
        numbers[f"hop/{hop}/score_mean"] = fmean(values)
        numbers[f"hop/{hop}/score_std"] = stdev(values) if len(values) > 1 else 0.0
    return numbers


def solved(valid: Sequence[Verdict]) -> dict[str, float]:
    """Share of the judged questions with k of their n judged attempts right; {} when no question was judged.

    The solver's own training has no attempts.
    """
    pairs = [(int(v["attempts_correct"]), int(v["attempts_valid"])) for v in valid if v.get("attempts_valid")]
    if not pairs:
        return {}
    right = Counter(k for k, _ in pairs)
    return {
        "judged": float(len(pairs)),
        **{f"solved/{k}": right[k] / len(pairs) for k in range(max(n for _, n in pairs) + 1)},
        "solvable_share": fmean([float(0 < k < n) for k, n in pairs]),
        "never_solved_share": fmean([float(k == 0) for k, _ in pairs]),
        "always_solved_share": fmean([float(k == n) for k, n in pairs]),
    }


def wording(valid: Sequence[Verdict]) -> dict[str, float]:
    """Shares of the valid rollouts with a question: those that are like a recent one, and by what they ask for.

    `repeated_share` are questions that are also asked about another paper of the step; with few questions it would be
    chance and is left out. Copies of a worked example are counted apart, as a share of all with a question.
    """
    written = [verdict for verdict in valid if verdict["question"]]
    asked = [verdict for verdict in written if not verdict.get("copied")]
    copied = {"copied_share": 1 - len(asked) / len(written)} if written else {}
    if not asked:
        return copied
    kinds = Counter(verdict["reasoning_type"] for verdict in asked)
    papers: dict[str, set[str]] = defaultdict(set)
    for verdict in asked:
        papers[normalise(verdict["question"])].add(verdict["pmid"])
    repeated = fmean([float(len(papers[normalise(verdict["question"])]) > 1) for verdict in asked])
    return copied | {
        **({"repeated_share": repeated} if len(asked) >= ENOUGH_QUESTIONS else {}),
        **({"duplicates_share": fmean([float(v["novelty"] < 1) for v in asked])} if "novelty" in asked[0] else {}),
        **{f"reasoning/{kind}": count / len(asked) for kind, count in sorted(kinds.items())},
    }


def attempt_seconds(verdicts: Iterable[Verdict]) -> list[float]:
    """How long each attempt took, lost ones among them."""
    return [float(attempt["seconds"]) for verdict in verdicts for attempt in verdict["attempts"]]


def console_lines(step: int, metrics: Mapping[str, float], verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Labels and texts of one step, from its `step_metrics` and a sample; none for a step without verdicts."""
    if not verdicts:
        return []
    return list(chain(counts(step, metrics), rewards(metrics), sample_lines(verdicts)))


def counts(step: int, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The step's rollouts and searches."""
    lost = ", ".join(
        f"{count:.0f} by {name.removeprefix('invalid/')}"
        for name, count in metrics.items()
        if name.startswith("invalid/")
    )
    made, failed = metrics["searches_made"], metrics["searches_failed"]
    return [
        (f"Step {step}", f"{metrics['rollouts']:.0f} rollouts, lost: {lost or 'none'}"),
        ("Searches", f"{made:.0f} with papers, {failed:.0f} failed"),
    ]


def rewards(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Averages and maxima of the format score and the reward, and how the questions fared."""
    lines = [
        (label, f"Avg {metrics[f'{part}_mean']:.3f}, Max {metrics[f'{part}_max']:.3f}")
        for label, part in (("Format scores", "format"), ("Rewards", "score"))
        if f"{part}_mean" in metrics
    ]
    if "judged" in metrics:
        shares = (("sometimes", "solvable_share"), ("never", "never_solved_share"), ("always", "always_solved_share"))
        solved = ", ".join(f"{metrics[name]:.0%} {word}" for word, name in shares)
        lines.append(("Questions", f"{metrics['judged']:.0f} judged; solved {solved}"))
    return lines


def sample_lines(verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """The valid rollout with the highest score among those with attempts; [] when there is none."""
    tried = [verdict for verdict in valid_only(verdicts) if verdict["attempts"]]
    if not tried:
        return []
    best = max(tried, key=lambda verdict: float(verdict["score"]))
    answers = [shorten(attempt["answer"] or f"({attempt['ended']})", LONGEST_ANSWER) for attempt in best["attempts"]]
    right = f"{best['attempts_correct']:.0f} of {best['attempts_valid']:.0f} right"
    return [
        ("Proposer's question", f"{shorten(best['question'], LONGEST_TEXT)} ({best['hop']}-hop)"),
        ("Proposer's answer", shorten(best["answer"], LONGEST_TEXT)),
        ("Solver's answers", f"{json.dumps(answers, ensure_ascii=False)}, {right}"),
    ]


def shorten(text: str, longest: int) -> str:
    """Text of a model on one line of at most `longest` characters, without any that would steer a terminal."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(shown.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _family(name: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{kind}": float(number) for kind, number in sorted(numbers.items())}

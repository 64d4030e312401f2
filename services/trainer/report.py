"""Stage `report`: the artifacts of a round, and the evaluations of those before → `report.html` and `safety.html`.

What the rounds have taught, curves of both trainings, held-out results before and after, how the questions fared,
sample questions with their papers, answers of base and round side by side, what ran for how long, and how far rollout
engine and trained model differed. The second page shows the replies to the prompts of `safety.py`, where they were
asked. No script, no outside resource; all text of models and papers is escaped.
"""

import inspect
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from services.trainer import safety
from services.trainer.paths import RunPaths
from services.trainer.records import TRAIN, Verdict, mean_parts, read_lines, valid_only
from services.trainer.rounds import paths_of, starting_model
from services.trainer.run_state import read_state
from services.trainer.safety import LABELS
from services.trainer.step_metrics import mismatch, step_metrics, step_times
from shared.corpus import Corpus
from shared.files import hash_file, hash_json, publish, read_manifest, stale_reason
from shared.settings import Settings

if TYPE_CHECKING:
    import jinja2

TEMPLATE = Path(__file__).parent / "report.html.j2"
SAFETY_TEMPLATE = Path(__file__).parent / "safety.html.j2"
SAMPLES = 6
PARTS = (
    ("score", "reward 0.5·F + D"),
    ("format", "format score F"),
    ("difficulty", "difficulty D"),
    ("format_integrity", "integrity gate"),
    ("format_think", "thinks first"),
    ("format_tool", "searches as asked"),
    ("format_question", "question stands"),
    ("format_answer", "answer in the evidence"),
    ("citations", "cited papers were seen"),
    ("genes", "gene symbols exist"),
    ("reasoning", "asks for reasoning"),
    ("novelty", "not asked before"),
    ("searches_made", "searches with papers"),
    ("attempts_made", "solver attempts"),
    ("attempts_correct", "right attempts"),
)
ANSWER_PARTS = (
    ("score", "exact match"),
    ("biomedical_match", "match, synonyms counted"),
    ("answered", "answered"),
    ("searches_made", "searches with papers"),
)
TIMES = (
    ("generation", "rollouts, searches"),
    ("reward", "reward after the last rollout"),
    ("log_probs", "log-probabilities"),
    ("advantage", "advantages"),
    ("update", "update"),
    ("weights", "weights to the rollout"),
    ("checkpoint", "checkpoint"),
    ("other", "other, idle"),
    ("step", "whole step"),
    ("validation", "validation, after the step"),
)
MISMATCHES = (
    ("correlation", "correlation of the probabilities (1: equal)"),
    ("mean_difference", "mean difference of a probability"),
    ("largest_difference", "largest difference of a probability"),
    ("kl", "KL(rollout ‖ trained), mean log ratio, in nats"),
    ("k3_kl", "KL(rollout ‖ trained), k3 estimate, in nats"),
)


def write_report(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Write report.html unless the current one is there. `settings` are those of the round's proposer."""
    rounds = range(1, settings.trainer.round + 1)
    evaluations = [read_manifest(paths_of(settings, number, "solver").evaluation).identity for number in rounds]
    templates = {"template": hash_file(TEMPLATE), "safety_template": hash_file(SAFETY_TEMPLATE)}
    origin = {"evaluations": hash_json(evaluations), **templates}
    if stale_reason(paths.report, settings={}, made_from=origin) is None:
        log.info("report reused", path=str(paths.report))
        return
    with publish(paths.report, settings={}, made_from=origin) as draft:
        pages = {"report.html": render(settings, paths), "safety.html": render_safety(settings)}
        for name, page in pages.items():
            if page:
                (draft.path / name).write_text(page, encoding="utf-8")
                draft.rows += 1
    log.info("report written", path=str(paths.report / "report.html"))


def render(settings: Settings, paths: RunPaths) -> str:
    """The report."""
    solver = paths_of(settings, settings.trainer.round, "solver")
    rollouts = list(read_lines(paths.training / "rollouts.jsonl"))
    numbers = step_metrics(rollouts)
    metrics = list(read_lines(paths.training / "metrics.jsonl"))
    timed = [m for m in metrics if "timing_s/step" in m]
    steps, solved_steps = by_step(rollouts), by_step(list(read_lines(solver.training / "rollouts.jsonl")))
    evaluations = read_evaluations(settings)
    corpus = Corpus(paths.corpus)
    return template_of(TEMPLATE).render(
        run=settings.trainer.run,
        round=settings.trainer.round,
        profile=settings.profile,
        model=starting_model(settings, settings.trainer.round, "proposer"),
        solver=starting_model(settings, settings.trainer.round, "solver"),
        papers=len(corpus),
        rollouts=len(rollouts),
        searched=sum(v["searches_made"] > 0 for v in rollouts),
        invalid=len(rollouts) - len(valid_only(rollouts)),
        advantage=settings.trainer.advantage.upper(),
        variant=settings.trainer.reward.variant,
        solved=family(numbers, "solved/"),
        hops=[(hop, *hop_row(numbers, hop)) for hop in range(1, 5) if f"hop/{hop}/count" in numbers],
        kinds=family(numbers, "reasoning/"),
        endings=family(numbers, "ended/"),
        evaluation=evaluations[-1],
        evaluations=evaluations,
        exam_rows={name: exam_rows(name, evaluations) for name in evaluations[-1]["sets"]},
        parts=PARTS,
        answer_parts=ANSWER_PARTS,
        reward_plot=plot(sorted(steps), curves(steps, PARTS[:3]), "step", ""),
        answer_plot=plot(sorted(solved_steps), curves(solved_steps, ANSWER_PARTS), "step", ""),
        compared=compared(paths),
        loss_plot=plot(*learning_curves(metrics), "step", ""),
        samples=[sample(v, corpus) for v in best(rollouts)],
        stages=stage_rows(settings, read_state(paths.run)),
        times=time_rows(timed),
        mismatches=mismatch_rows(timed),
        step_numbers=[m["step"] for m in timed],
        settings=settings.model_dump(mode="json"),
    )


def render_safety(settings: Settings) -> str:
    """The page of the safety prompts, or "" where none were asked."""
    found = read_evaluations(settings)[-1]["safety"]
    if found is None:
        return ""
    groups = dict.fromkeys(row["group"] for row in found["prompts"])
    return template_of(SAFETY_TEMPLATE).render(
        run=settings.trainer.run,
        round=settings.trainer.round,
        safety=found,
        groups=list(groups),
        labels=LABELS,
        rules=inspect.cleandoc(safety.__doc__ or "").split("\n\n", 1)[1],  # they stand there and nowhere else
    )


def template_of(file: Path) -> "jinja2.Template":
    """A template that escapes all values and knows them all."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(file.read_text(encoding="utf-8"))


def stage_rows(settings: Settings, state: Mapping[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The stages with what they have cost, but not this one: what it costs is not known before its end."""
    return [(label, stage) for label, stage in state.items() if label != f"{settings.trainer.round}.report"]


def family(numbers: dict[str, float], prefix: str) -> list[tuple[str, float]]:
    """The members of one family of `step_metrics`, without its prefix."""
    return [(name.removeprefix(prefix), value) for name, value in numbers.items() if name.startswith(prefix)]


def hop_row(numbers: dict[str, float], hop: int) -> tuple[float, ...]:
    """Number of valid rollouts of a hop, mean and standard deviation of their reward."""
    return tuple(numbers[f"hop/{hop}/{name}"] for name in ("count", "score_mean", "score_std"))


def by_step(verdicts: Sequence[Verdict]) -> dict[int, list[Verdict]]:
    """Training verdicts grouped by step."""
    steps: dict[int, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict["split"] == TRAIN:
            steps.setdefault(verdict["step"], []).append(verdict)
    return steps


def curves(steps: dict[int, list[Verdict]], parts: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
    """The mean of each of these parts per step."""
    means = [mean_parts(steps[step]) for step in sorted(steps)]
    return {label: [m.get(name, math.nan) for m in means] for name, label in parts}


def learning_curves(metrics: Sequence[dict[str, Any]]) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and verl's entropy, gradient norm and response length per step."""
    rows = [m for m in metrics if "actor/grad_norm" in m]
    keys = (("actor/grad_norm", "gradient norm"), ("actor/entropy", "entropy"))
    return [m["step"] for m in rows], {label: [m[key] for m in rows] for key, label in keys if rows and key in rows[0]}


def time_rows(timed: Sequence[dict[str, Any]]) -> list[tuple[str, float, float, list[float | None]]]:
    """Of each part of a step that was timed: label, mean seconds, share of the steps' time, seconds per step."""
    parts = [step_times(m) | {"step": m["timing_s/step"]} for m in timed]
    whole = sum(part["step"] for part in parts)
    rows = []
    for name, label in TIMES:
        seconds = [part.get(name) for part in parts]
        total = sum(filter(None, seconds))
        if any(value is not None for value in seconds):
            rows.append((label, total / len(parts), total / whole, seconds))
    return rows


def mismatch_rows(timed: Sequence[dict[str, Any]]) -> list[tuple[str, list[float | None]]]:
    """Label and values per step of each measure of `mismatch` that verl has taken."""
    measured = [mismatch(m) for m in timed]
    rows = [(label, [numbers.get(name) for numbers in measured]) for name, label in MISMATCHES]
    return [(label, values) for label, values in rows if any(value is not None for value in values)]


def best(rollouts: Sequence[Verdict]) -> list[Verdict]:
    """The most telling rollouts: those with a question and an answer, highest reward first."""
    asked = [v for v in valid_only(rollouts) if v["question"] and v["answer"]]
    return sorted(asked or rollouts, key=lambda v: (v["score"], v["searches_made"]), reverse=True)[:SAMPLES]


def sample(verdict: Verdict, corpus: Corpus) -> dict[str, Any]:
    """A rollout with the papers it started from and found."""
    found = [pmid for search in verdict["searches"] for pmid in search["pmids"]]
    papers = [corpus.find(pmid) for pmid in dict.fromkeys([verdict["pmid"], *found])]
    return {**verdict, "papers": [paper for paper in papers if paper is not None]}


def read_evaluations(settings: Settings) -> list[dict[str, Any]]:
    """evaluation.json of every round up to that of the settings."""
    rounds = range(1, settings.trainer.round + 1)
    files = [paths_of(settings, number, "solver").evaluation / "evaluation.json" for number in rounds]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def exam_rows(name: str, evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Label and marks of the base and of each round in one set.

    The base stands again above each round that it was compared with otherwise: on other questions, or with other
    answers, because index or settings had changed.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    shown = None
    for one in evaluations:
        if name in one["sets"]:
            found = one["sets"][name]
            if (found["asked"], found["base"]) != shown:
                label = f"base, as asked in round {one['round']}" if shown else "base"
                rows.append((label, found["base"] | {"change": None}))
                shown = (found["asked"], found["base"])
            rows.append((f"round {one['round']}", found["round"] | {"change": found["change"]}))
    return rows


def compared(paths: RunPaths) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Answers of base and round to the same questions: first those that only one of them knew."""
    before, after = (list(read_lines(paths.evaluation / f"answers-{name}.jsonl")) for name in ("base", "round"))
    pairs = list(zip(before, after, strict=True))
    return sorted(pairs, key=lambda pair: pair[0]["right"] == pair[1]["right"])[:SAMPLES]


def plot(x: Sequence[int], lines: dict[str, list[float]], x_label: str, y_label: str) -> str:
    """An SVG of some lines; "" when there is nothing to draw."""
    if not x or not lines:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    for label, values in lines.items():
        axes.plot(x, values, marker="o", markersize=3, label=label)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    text = io.StringIO()
    with rc_context({"svg.hashsalt": " ".join(lines)}):  # the same numbers, the same bytes; no id twice in a page
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]

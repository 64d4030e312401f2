"""Stage `evaluate`: what a round has taught both models → `evaluation/evaluation.json`, and the answers behind it.

Of the proposer and of the solver: verl's validation before and after training, greedy, on held-out seeds and on
questions that were kept out; with few of them the differences are noise, so each mean comes with its 95 % interval
(normal approximation). Of the solver further, beside the base model: exams (`exam.py`) on every set of
`trainer.evaluation.sets` and on all questions that this run has kept out so far, and how both answer prompts that want
care (`safety.py`). And how good the round's questions are.
"""

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import structlog
from rapidfuzz import fuzz

from services.trainer.evaluation_sets import KEPT_OUT, Item, evaluation_items
from services.trainer.exam import Graded, compare, marks, take_exam
from services.trainer.journal import Row, open_journal
from services.trainer.paths import RunPaths
from services.trainer.protocol import prompt_hash
from services.trainer.questions import FILE, read_rows
from services.trainer.records import HELD_OUT, Verdict, mean_parts, read_lines, valid_only
from services.trainer.rounds import paths_of
from services.trainer.safety import safety_items, safety_prompts, safety_results
from services.trainer.serving import serve
from shared.files import ArtifactError, hash_json, publish, read_manifest, stale_reason
from shared.model_files import resolve_model, weights_identity
from shared.settings import Settings

PAIRS = 2000  # of questions, whose likeness is measured


def evaluate(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Write the round's evaluation unless the current one is there. `settings` are those of its solver."""
    number = settings.trainer.round
    proposer = paths_of(settings, number, "proposer")
    items, with_safety = exam_items(settings), settings.trainer.evaluation.safety
    shape, origin = exam_settings(settings), evaluation_origin(settings, paths, items)
    if stale_reason(paths.evaluation, settings=shape, made_from=origin) is None:
        log.info("evaluation reused", path=str(paths.evaluation))
        return
    solvers = {"base": settings.solver.model, "round": str(paths.weights)}
    asked = [*items, *safety_items()] if with_safety else items
    replies = {name: examine(settings, model, asked, log) for name, model in solvers.items()}
    exams = {name: graded[: len(items)] for name, graded in replies.items()}
    safety = {name: graded[len(items) :] for name, graded in replies.items()}
    result: dict[str, Any] = {
        "round": number,
        "proposer": trained(proposer),
        "solver": trained(paths),
        "questions": question_quality(read_rows(paths.questions / FILE), read_manifest(paths.questions).counts),
        "sets": set_results(exams["base"], exams["round"]),
        "safety": safety_results(safety["base"], safety["round"]) if with_safety else None,
    }
    with publish(paths.evaluation, settings=shape, made_from=origin) as draft:
        text = json.dumps(result, indent=2, sort_keys=True) + "\n"
        (draft.path / "evaluation.json").write_text(text, encoding="utf-8")
        for name, graded in exams.items():
            write_answers(graded, draft.path / f"answers-{name}.jsonl")
        draft.rows = len(items)
    for name, found in result["sets"].items():
        log.info("evaluated", set=name, questions=found["round"]["questions"], base=round(found["base"]["accuracy"], 3),
                 round=round(found["round"]["accuracy"], 3), p=round(found["change"]["p"], 4))  # fmt: skip


def evaluation_origin(settings: Settings, paths: RunPaths, items: Sequence[Item]) -> dict[str, str]:
    """What the evaluation is made from, by identity."""
    prompts = [asdict(one) for one in safety_prompts()] if settings.trainer.evaluation.safety else []
    return {
        "proposer_training": read_manifest(paths_of(settings, settings.trainer.round, "proposer").training).identity,
        "solver_training": read_manifest(paths.training).identity,
        "solver": read_manifest(paths.weights).identity,
        "questions": read_manifest(paths.questions).identity,
        "index": read_manifest(paths.index).identity,
        "items": hash_json([asdict(item) for item in items]),
        "safety": hash_json(prompts),
    }


# --- exams


def exam_items(settings: Settings) -> list[Item]:
    """The questions of all sets, and those that this run has kept out in its rounds so far."""
    evaluation = settings.trainer.evaluation
    sets: dict[str, list[Item]] = defaultdict(list)
    for item in evaluation_items(evaluation):
        sets[item.set_name].append(item)
    for number in range(1, settings.trainer.round + 1):
        for row in read_rows(paths_of(settings, number, "proposer").questions / FILE):
            if row["split"] == HELD_OUT:
                item = Item(KEPT_OUT, f"{number}.{row['id']}", row["question"], (row["answer"],), papers=(row["pmid"],))
                sets[KEPT_OUT].append(item)
    return [item for found in sets.values() for item in found[: evaluation.most]]


def exam_settings(settings: Settings) -> dict[str, Any]:
    """The settings that shape an answer."""
    trainer, reward = settings.trainer, settings.trainer.reward
    return {
        "prompts": trainer.prompts,
        "prompt": prompt_hash("solver", trainer.prompts),
        "worked_examples": reward.worked_examples,
        "max_turns": reward.max_turns,
        "max_new_tokens": reward.max_new_tokens,
        "max_tool_tokens": reward.max_tool_tokens,
        "search_top_k": trainer.search_top_k,
        "context_tokens": settings.solver.context_tokens,
    }


def examine(settings: Settings, model: str, items: Sequence[Item], log: structlog.stdlib.BoundLogger) -> list[Graded]:
    """The answers of `model` to `items`; what it has answered before is not asked again."""
    paths = paths_of(settings, settings.trainer.round, "solver")
    weights = weights_identity(resolve_model(model, settings))
    key = hash_json([weights, exam_settings(settings), read_manifest(paths.index).identity])
    journal = open_journal(paths.work.parents[1] / "exams" / key[:16], key)
    serve(settings, model, log)
    return asyncio.run(take_exam(settings, items, journal / "answers.jsonl"))


def by_set(before: Sequence[Graded], after: Sequence[Graded]) -> dict[str, tuple[list[Graded], list[Graded]]]:
    """The answers of two solvers by set."""
    sets: dict[str, tuple[list[Graded], list[Graded]]] = defaultdict(lambda: ([], []))
    for old, new in zip(before, after, strict=True):
        sets[old.item.set_name][0].append(old)
        sets[old.item.set_name][1].append(new)
    return dict(sets)


def set_results(before: Sequence[Graded], after: Sequence[Graded]) -> dict[str, Any]:
    """By set: the marks of base and round, what has changed, and `asked`, which tells other questions apart."""
    return {
        name: {
            "asked": hash_json([asdict(one.item) for one in new]),
            "base": marks(old),
            "round": marks(new),
            "change": compare(old, new),
        }
        for name, (old, new) in by_set(before, after).items()
    }


def write_answers(graded: Sequence[Graded], file: Path) -> None:
    """One JSON line per question: what was asked, said, and right."""
    with file.open("w", encoding="utf-8") as stream:
        for one in graded:
            row = {
                "set": one.item.set_name,
                "id": one.item.id,
                "question": one.item.question,
                "gold": list(one.item.answers),
                "answer": one.answer,
                "right": one.right,
                "paper_found": one.found,
                "turns": one.row["turns"],
                "searches": one.row["searches"],
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- training and questions


def trained(paths: RunPaths) -> dict[str, Any]:
    """A role's validation before and after its training, and how its weights have changed."""
    rows = list(read_lines(paths.training / "held_out.jsonl"))
    last = read_manifest(paths.training).settings["steps"]
    before, after = ([v for v in valid_only(rows) if v["step"] == step] for step in (0, last))
    if not before or not after:
        raise ArtifactError(
            f"expected judged held-out rollouts before and after training, found {len(before)} and {len(after)} (of "
            f"{len(rows)} in all); delete {paths.training} and run the same command again"
        )
    change = json.loads((paths.weights / "change.json").read_text(encoding="utf-8"))
    return {"before": summary(before), "after": summary(after), "weights": change}


def summary(verdicts: list[Verdict]) -> dict[str, Any]:
    """Per number in the verdicts, which are all valid: mean, 95 % half-width and count."""
    return {name: interval([v[name] for v in verdicts]) for name in mean_parts(verdicts)}


def interval(values: list[float]) -> dict[str, float]:
    """Mean and half-width of its 95 % confidence interval, 1.96·s/√n; half-width 0 for a single value."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((v - mean) ** 2 for v in values) / (count - 1) if count > 1 else 0.0
    return {"mean": mean, "half_width_95": 1.96 * math.sqrt(variance / count), "count": float(count)}


def question_quality(rows: Sequence[Row], counts: Mapping[str, int]) -> dict[str, Any]:
    """Of a round's questions: share of candidates kept, difficulty, diversity, citations, kinds of reasoning."""
    cited = [row for row in rows if row["cited"]]
    kinds = [row["reasoning_type"] for row in rows]
    return {
        "candidates": counts["candidates"],
        "kept": len(rows),
        "valid_share": len(rows) / counts["candidates"] if counts["candidates"] else 0.0,
        "rejected": {n.removeprefix("rejected_"): c for n, c in counts.items() if n.startswith("rejected_")},
        "difficulty": fmean(row["difficulty"] for row in rows) if rows else None,
        "likeness": mean_likeness([row["question"] for row in rows]),
        "cited_share": len(cited) / len(rows) if rows else None,
        "citations_seen": fmean(citations_seen(row) for row in cited) if cited else None,
        "reasoning": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


def citations_seen(row: Row) -> float:
    """Share of a question's cited PMIDs that its proposer had before it."""
    seen = {row["pmid"], *(pmid for hop in row["hops"] for pmid in hop["pmids"])}
    return fmean(float(pmid in seen) for pmid in row["cited"])


def mean_likeness(questions: Sequence[str]) -> float | None:
    """Mean likeness of two questions in [0, 1]: 0 for nothing in common, 1 for copies; a sample of pairs of many."""
    pairs = list(combinations(questions, 2))
    if not pairs:
        return None
    chosen = pairs if len(pairs) <= PAIRS else Random(0).sample(pairs, PAIRS)  # noqa: S311
    return fmean(fuzz.token_sort_ratio(*pair) / 100 for pair in chosen)

"""An exam: a solver answers questions whose answers are known, with the search, greedily; and its marks.

The tool loop is that of the attempts, at temperature 0. Answers go through a journal per solver and settings, so each
question is asked once, whoever wants to know; with another wording it is another question. Intervals and tests are
scipy's: Wilson's interval for a share, and the exact McNemar test for two solvers on the same questions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from services.trainer.attempts import solver_manner
from services.trainer.candidates import deadline, hold, last_answer, services
from services.trainer.evaluation_sets import Item
from services.trainer.journal import Row, journalled
from services.trainer.matching import exact_match, normalise
from services.trainer.protocol import alone_messages, solver_messages
from shared.files import hash_json
from shared.progress import Progress
from shared.settings import Settings


@dataclass(frozen=True, slots=True)
class Graded:
    """One answered question."""

    item: Item
    answer: str  # among the item's choices where it has any; "" for none
    right: bool
    found: bool  # whether a search showed a paper that the question is about
    overdue: bool  # whether it was given up at its deadline
    searches: int
    row: Row  # turns and searches


async def take_exam(settings: Settings, items: Sequence[Item], file: Path, *, search: bool = True) -> list[Graded]:
    """The answers of the solver that :8001 serves, in the order of `items`; without `search` from memory alone."""
    trainer, evaluation = settings.trainer, settings.trainer.evaluation
    by_name = {f"{item.set_name}/{item.id}/{hash_json(asked(item))[:8]}": item for item in items}
    manner = replace(solver_manner(settings), temperature=0.0)
    if not search:
        manner = replace(manner, max_turns=1, tool=False)
    ask = solver_messages if search else alone_messages
    async with services(settings) as conversations:

        async def answer(name: str) -> Row:
            messages = ask(asked(by_name[name]), trainer.prompts, trainer.reward.worked_examples)
            talk = conversations.begin(messages, seed=trainer.seed, until=deadline(settings))
            ended = await hold(conversations, talk, manner)
            return {"answer": last_answer(talk), "ended": ended, "turns": talk.turns, "searches": talk.searches}

        with Progress("exam", settings, total=len(by_name), unit="question") as progress:
            at_once = evaluation.concurrency
            rows = await journalled(file, list(by_name), answer, at_once=at_once, progress=progress)
    return [grade(by_name[row["name"]], row) for row in rows]


def asked(item: Item) -> str:
    """The question as the solver reads it, its choices named."""
    return f"{item.question} Answer with one of: {', '.join(item.choices)}." if item.choices else item.question


def grade(item: Item, row: Row) -> Graded:
    """Whether an answer is right: it equals one of the item's after normalisation, or chooses as it should."""
    answer = chosen(row["answer"], item.choices) if item.choices else row["answer"]
    found = any(pmid in item.papers for search in row["searches"] for pmid in search["pmids"])
    right = any(exact_match(answer, gold) for gold in item.answers)
    return Graded(item, answer, right, found, row["ended"] == "deadline", len(row["searches"]), row)


def chosen(answer: str, choices: Sequence[str]) -> str:
    """The choice that an answer is or begins with, or ""; of several the longest."""
    words = normalise(answer)
    begun = [choice for choice in choices if f"{words} ".startswith(f"{normalise(choice)} ")]
    return max(begun, key=lambda choice: len(normalise(choice)), default="")


def marks(graded: Sequence[Graded]) -> dict[str, Any]:
    """Accuracy and retrieval recall with 95 % intervals, macro-F1 over the choices that all have, and what was done.

    `paper_found` is the share of questions about a paper whose searches showed one that they are about.
    """
    right = sum(one.right for one in graded)
    about = [one for one in graded if one.item.papers]
    found = sum(one.found for one in about)
    return {
        "questions": len(graded),
        "right": right,
        "accuracy": right / len(graded),
        "interval_95": share_interval(right, len(graded)),
        "macro_f1": macro_f1(graded),
        "answered": sum(bool(one.answer) for one in graded) / len(graded),
        "overdue": sum(one.overdue for one in graded),
        "answers": dict(Counter(one.answer for one in graded)) if common_choices(graded) else None,
        "searches": sum(one.searches for one in graded) / len(graded),
        "about_a_paper": len(about),
        "paper_found": found / len(about) if about else None,
        "paper_found_interval_95": share_interval(found, len(about)) if about else None,
    }


def macro_f1(graded: Sequence[Graded]) -> float | None:
    """Mean F1 of the choices, an answer that is none of them counting against its gold; None without common ones."""
    labels = common_choices(graded)
    if not labels:
        return None
    scores = []
    for label in labels:
        hit = sum(one.answer == label and one.right for one in graded)
        said = sum(one.answer == label for one in graded)
        gold = sum(label in one.item.answers for one in graded)
        scores.append(2 * hit / (said + gold) if said + gold else 0.0)
    return sum(scores) / len(scores)


def common_choices(graded: Sequence[Graded]) -> tuple[str, ...]:
    """The choices that every question has; () when they have none, or different ones."""
    found = {one.item.choices for one in graded}
    return found.pop() if len(found) == 1 else ()


def share_interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    found = binomtest(right, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def compare(before: Sequence[Graded], after: Sequence[Graded]) -> dict[str, Any]:
    """Two solvers on the same questions: which only one of them knew, and McNemar's exact two-sided p."""
    from scipy.stats import binomtest

    pairs = list(zip(before, after, strict=True))
    gained = sum(new.right and not old.right for old, new in pairs)
    lost = sum(old.right and not new.right for old, new in pairs)
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    difference = (gained - lost) / len(pairs)
    return {"gained": gained, "lost": lost, "difference": difference, "p": p}

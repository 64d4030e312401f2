"""The reward of one proposed question: format score F, difficulty D, and their sum.

Pure functions of plain values. `graded` is the paper's own form of F (arXiv 2601.07055, App. A: think, tool, question
and answer, each worth up to a quarter, no gate on the sum); `gated` is the released code's (mean of integrity, think,
tool and answer, or 0 when integrity fails). D is the paper's Eq. 4. What the variant `biomedical` adds is a weighted
sum of the parts of `biomedical.py`, paid only behind the gate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.trainer.matching import contains, strip_citations
from shared.transcript import begins_with_thinking, last_tag

FULL_ANSWER_WORDS = 5
HALF_ANSWER_WORDS = 10


@dataclass(frozen=True, slots=True)
class Proposal:
    """What the proposer did: its turns, its searches that brought papers, and what it could read."""

    turns: tuple[str, ...]
    hop: int
    searches: int  # calls that brought papers
    failed_calls: int  # broken calls and calls that brought none
    evidence: str  # seed document and search results
    seen: tuple[str, ...] = ()  # PMIDs of the seed and of all papers the searches returned
    copied: bool = False  # whether the question is that of a worked example, whose answer the solver was shown

    @property
    def question(self) -> str:
        """The last question tag, or ""."""
        return last_tag("\n".join(self.turns), "question")

    @property
    def cited_answer(self) -> str:
        """The last answer tag as written, or ""."""
        return last_tag("\n".join(self.turns), "answer")

    @property
    def answer(self) -> str:
        """The answer without its citations, or ""."""
        return strip_citations(self.cited_answer)


def format_parts(proposal: Proposal) -> dict[str, float]:
    """Each part of the format score by name, in [0, 1]; a copied question counts as none, and its answer neither."""
    question, answer = ("", "") if proposal.copied else (proposal.question, proposal.answer)
    stands = bool(question) and bool(answer)
    leaked = stands and contains(question, answer)
    return {
        "integrity": float(stands and not leaked),
        "think": _mean([float(begins_with_thinking(turn)) for turn in proposal.turns]),
        "tool": tool_part(proposal.hop, proposal.searches, proposal.failed_calls),
        "question": question_part(question, leaked),
        "answer": answer_part(answer, proposal.evidence),
        "answer_given": float(bool(answer)),
    }


def tool_part(hop: int, searches: int, failed_calls: int) -> float:
    """1 for exactly hop−1 searches that brought papers, else the smaller of the two numbers over the larger.

    Failed calls never count as searches. One hop needs none: 1/(1 + calls), failed ones included.
    """
    needed = hop - 1
    if needed == 0:
        return 1 / (1 + searches + failed_calls)
    return min(searches, needed) / max(searches, needed)


def question_part(question: str, leaked: bool) -> float:
    """0 without a question, 0.5 for one, 1 when it ends with a question mark and does not hold the answer."""
    if not question:
        return 0.0
    return 1.0 if question.endswith("?") and not leaked else 0.5


def answer_part(answer: str, evidence: str) -> float:
    """1 for an answer of at most 5 words that stands in the evidence on token boundaries, 0.5 for 6 to 10, else 0."""
    words = len(answer.split())
    if words > HALF_ANSWER_WORDS or not contains(evidence, answer):
        return 0.0
    return 1.0 if words <= FULL_ANSWER_WORDS else 0.5


def format_score(parts: Mapping[str, float], form: str) -> float:
    """F in [0, 1] from `format_parts`, for the form `graded` or `gated`."""
    if form == "graded":
        answer = 0.25 * parts["answer_given"] + 0.75 * parts["answer"]
        return _mean([parts["think"], parts["tool"], parts["question"], answer])
    if parts["integrity"] == 0:
        return 0.0
    return _mean([parts["integrity"], parts["think"], parts["tool"], parts["answer"]])


def difficulty(correct: float, attempts: int) -> float:
    """Eq. 4: (n−k)/(n−1) for 0 < k < n, else 0; at most 1. Needs n ≥ 2.

    With credit for synonyms k may lie below 1; it counts as 1 then.
    """
    if attempts < 2 or not 0 <= correct <= attempts:
        raise ValueError(f"expected 0 ≤ correct ≤ attempts and attempts ≥ 2, got {correct} of {attempts}")
    return min(1.0, (attempts - correct) / (attempts - 1)) if 0 < correct < attempts else 0.0


def expected_difficulty(rate: float, attempts: int) -> float:
    """E[D] of a question that each attempt solves with probability `rate`: n/(n−1)·((1−p) − (1−p)^n).

    Its maximum lies at p = 1 − n^(−1/(n−1)): the pass rate the proposer is drawn to.
    """
    return attempts / (attempts - 1) * ((1 - rate) - (1 - rate) ** attempts)


def bonus(parts: Mapping[str, float], weights: Mapping[str, float], integrity: float) -> float:
    """Σ weight·part of the biomedical parts, in [0, Σ weight]; 0 when the integrity gate fails."""
    return sum(weight * parts[name] for name, weight in weights.items()) if integrity else 0.0


def reward(format_score: float, difficulty: float, format_weight: float, bonus: float = 0.0) -> float:
    """format_weight·F + D + bonus; with weight 0.5 and no bonus in [0, 1.5]."""
    return format_weight * format_score + difficulty + bonus


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

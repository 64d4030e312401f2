"""The reward of one proposed question: format score F, difficulty D, and 0.5·F + D.

Pure functions of plain values. `graded` is the paper's own form (arXiv 2601.07055, App. A: think, tool, question and
answer, each worth up to a quarter, no gate on the sum); `gated` is the released code's (mean of integrity, think, tool
and answer, or 0 when integrity fails). D is the paper's Eq. 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.trainer.matching import contains
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

    @property
    def question(self) -> str:
        """The last question tag, or ""."""
        return last_tag("\n".join(self.turns), "question")

    @property
    def answer(self) -> str:
        """The last answer tag, or ""."""
        return last_tag("\n".join(self.turns), "answer")


def format_parts(proposal: Proposal) -> dict[str, float]:
    """Each part of the format score by name, in [0, 1]."""
    question, answer = proposal.question, proposal.answer
    stands = bool(question) and bool(answer)
    leaked = stands and contains(question, answer)
    return {
        "integrity": float(stands and not leaked),
        "think": _mean([float(begins_with_thinking(turn)) for turn in proposal.turns]),
        "tool": tool_part(proposal.hop, proposal.searches, proposal.failed_calls),
        "question": 0.0 if not question else 0.5 + 0.5 * float(question.endswith("?") and not leaked),
        "answer": answer_part(answer, proposal.evidence),
    }


def tool_part(hop: int, searches: int, failed_calls: int) -> float:
    """Share of the hop−1 searches that were made and brought papers; 1 hop: 1 unless a call failed.

    Further searches earn nothing, failed ones never count.
    """
    if hop <= 1:
        return float(failed_calls == 0)
    return min(searches, hop - 1) / (hop - 1)


def answer_part(answer: str, evidence: str) -> float:
    """0.25 for an answer, and if it stands in the evidence: 1 for ≤ 5 words, 0.5 for 6 to 10."""
    if not answer:
        return 0.0
    words = len(answer.split())
    if words > HALF_ANSWER_WORDS or not contains(evidence, answer):
        return 0.25
    return 1.0 if words <= FULL_ANSWER_WORDS else 0.5


def format_score(parts: Mapping[str, float], form: str) -> float:
    """F in [0, 1] from `format_parts`, for the form `graded` or `gated`."""
    if form == "graded":
        return _mean([parts["think"], parts["tool"], parts["question"], parts["answer"]])
    if parts["integrity"] == 0:
        return 0.0
    return _mean([parts["integrity"], parts["think"], parts["tool"], parts["answer"]])


def difficulty(correct: int, attempts: int) -> float:
    """Eq. 4: (n−k)/(n−1) for 0 < k < n, else 0. Needs n ≥ 2."""
    if attempts < 2 or not 0 <= correct <= attempts:
        raise ValueError(f"expected 0 ≤ correct ≤ attempts and attempts ≥ 2, got {correct} of {attempts}")
    return (attempts - correct) / (attempts - 1) if 0 < correct < attempts else 0.0


def reward(format_score: float, difficulty: float, format_weight: float) -> float:
    """format_weight·F + D; with 0.5 in [0, 1.5]."""
    return format_weight * format_score + difficulty


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

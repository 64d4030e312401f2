"""One rollout and its attempts → a verdict: every part by name, their sum as `score`, and whether it is valid. Pure.

Attempts that a service lost are neither right nor wrong: D is computed from the judged ones when there are at least
`min_attempts`, else the rollout is invalid. An invalid rollout has score 0 as a place holder only; the trainer gives it
no advantage and takes it out of the update.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.trainer.biomedical import citation_part, gene_part, novelty_part, reasoning_part
from services.trainer.matching import cited_pmids, exact_match, match_credit
from services.trainer.scores import Proposal, bonus, difficulty, format_parts, format_score, reward
from shared.records import Attempt
from shared.settings import BiomedicalSettings, RewardSettings


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a verdict depends on beside the rollout itself."""

    form: str  # "graded" or "gated", at this step
    recent: Sequence[str]  # questions of earlier steps, normalised or not
    known: Callable[[str], bool]  # whether the corpus holds a PMID


def judge(
    proposal: Proposal, attempts: Sequence[Attempt], settings: RewardSettings, around: Surroundings, *, lost: str = ""
) -> dict[str, float]:
    """All numbers of the verdict. `lost` names the service, or `deadline`, that ended the rollout."""
    parts = format_parts(proposal)
    extra = biomedical_parts(proposal, settings.biomedical, around)
    form = format_score(parts, around.form)
    judged = [attempt for attempt in attempts if not attempt.lost]
    valid = not lost and not (attempts and len(judged) < settings.min_attempts)
    earned = [match_credit(attempt.answer, proposal.answer, synonym_credit(settings)) for attempt in judged]
    hard = difficulty(sum(earned), len(judged)) if valid and judged else 0.0
    added = bonus(extra, bonus_weights(settings), parts["integrity"])
    return {
        "score": reward(form, hard, settings.format_weight, added) if valid else 0.0,
        "valid": float(valid),
        "format": form,
        "difficulty": hard,
        "bonus": added,
        **{f"format_{name}": value for name, value in parts.items()},
        **extra,
        "attempts_made": float(len(attempts)),
        "attempts_valid": float(len(judged)),
        "attempts_correct": float(sum(exact_match(attempt.answer, proposal.answer) for attempt in judged)),
        "attempts_credit": sum(earned),
        "copied": float(proposal.copied),
        "searches_made": float(proposal.searches),
        "calls_failed": float(proposal.failed_calls),
    }


def biomedical_parts(proposal: Proposal, settings: BiomedicalSettings, around: Surroundings) -> dict[str, float]:
    """The parts of the biomedical variant, measured in every variant."""
    question = proposal.question
    cited = cited_pmids(f"{question}\n{proposal.cited_answer}")
    return {
        "citations": citation_part(cited, proposal.seen, around.known),
        "genes": gene_part(f"{question}\n{proposal.answer}"),
        "reasoning": reasoning_part(question),
        "novelty": novelty_part(question, around.recent, settings.novelty_threshold),
    }


def bonus_weights(settings: RewardSettings) -> dict[str, float]:
    """Weight of each biomedical part: none in the variant `paper`."""
    if settings.variant == "paper":
        return {}
    extra = settings.biomedical
    return {
        "citations": extra.citation_weight,
        "genes": extra.gene_weight,
        "reasoning": extra.reasoning_weight,
        "novelty": extra.novelty_weight,
    }


def synonym_credit(settings: RewardSettings) -> float:
    """What a synonym counts in this variant; the paper knows exact matches only."""
    return settings.biomedical.synonym_credit if settings.variant == "biomedical" else 0.0


def invalid_reason(attempts: Sequence[Attempt], valid: bool, lost: str) -> str:
    """Why a rollout is invalid: `lost`, or the commonest ending of its lost attempts; "" when it is valid."""
    if valid:
        return ""
    return lost or Counter(attempt.ended for attempt in attempts if attempt.lost).most_common(1)[0][0]


def worth_attempting(proposal: Proposal, settings: RewardSettings) -> bool:
    """Whether the solver is asked: only where difficulty can be paid, in either form of the format score.

    There are question and answer, the question does not hold its answer and is no worked example's, and where the
    variant wants grounded answers, the answer is.
    """
    parts = format_parts(proposal)
    ungrounded = settings.variant == "biomedical" and settings.biomedical.grounded and not parts["answer"]
    return parts["integrity"] > 0 and not ungrounded

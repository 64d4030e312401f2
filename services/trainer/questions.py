"""Stage `questions`: the round's trained proposer → `questions/questions.parquet`, verified questions for the solver.

The proposer is served on :8001 and writes `questions.candidates` questions about each paper that the stage `seeds` has
set aside, with the search, as it has learnt to. Then the round's solver is served again and answers each well-formed
candidate without the search: `questions.tries` times with the proposer's evidence before it, as often without. Kept is
what it can answer from the evidence and does not know by heart. Near-duplicates go, and what rests on a paper of an
evaluation set. The questions of a share of the papers are kept out of training, and no question of the others rests on
those papers. `rejected.jsonl` has the rest, each with its reason. A killed stage goes on from its journal
(`candidates.py`).
"""

import asyncio
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import structlog

from services.trainer.biomedical import likeness, reasoning_type
from services.trainer.candidates import check_candidates, write_candidates
from services.trainer.journal import Row, open_journal
from services.trainer.matching import cited_pmids, exact_match
from services.trainer.paths import RunPaths
from services.trainer.protocol import alone_hash, prompt_hash
from services.trainer.records import HELD_OUT, TRAIN
from services.trainer.reward import read_proposal
from services.trainer.scores import format_parts
from services.trainer.seeds import barred_pmids, write_rows
from services.trainer.serving import serve
from shared.files import ArtifactError, hash_json, publish, read_manifest, stale_reason
from shared.model_files import resolve_model, weights_identity
from shared.settings import QuestionSettings, Settings

FILE = "questions.parquet"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One question that the proposer wrote, with all that it rests on."""

    name: str  # <paper>.<number>
    pmid: str
    hop: int
    question: str
    answer: str
    hops: list[Row]  # queries and pmids of each search
    evidence: str
    sound: bool  # question and answer are there, and the question does not hold its answer
    grounded: bool  # the answer stands in the evidence
    cited: tuple[str, ...]

    @property
    def sources(self) -> set[str]:
        """The papers that it rests on."""
        return {self.pmid, *(pmid for hop in self.hops for pmid in hop["pmids"])}


def make_questions(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Write the questions of the round unless the current ones are there. `settings` are those of its proposer."""
    barred = barred_pmids(settings.trainer)
    shape, origin = question_settings(settings), question_origin(settings, paths, barred)
    reason = stale_reason(paths.questions, settings=shape, made_from=origin)
    if reason is None:
        log.info("questions reused", path=str(paths.questions))
        return
    log.info("questions are written", because=reason)
    journal = open_journal(paths.candidates, hash_json([shape, origin]))
    serve(settings, str(paths.weights), log)

    def enough(rows: Iterable[Row]) -> bool:
        sound = {one.pmid for one in map(read_candidate, rows) if not objection(one, barred)}
        return 0 < settings.trainer.questions.enough <= len(sound)

    seeds = read_rows(paths.seeds / FILE)
    written = asyncio.run(write_candidates(settings, seeds, journal / "candidates.jsonl", enough))
    candidates = [read_candidate(row) for row in written]
    worth = [one for one in candidates if not objection(one, barred)]
    serve(settings, settings.solver.model, log)
    asked = [{"name": one.name, "question": one.question, "evidence": one.evidence} for one in worth]
    checked = asyncio.run(check_candidates(settings, asked, journal / "checks.jsonl"))
    checks = dict(zip((one.name for one in worth), checked, strict=True))
    kept, rejected = select(candidates, checks, settings, barred)
    require_disjoint(kept, barred)
    with publish(paths.questions, settings=shape, made_from=origin) as draft:
        write_rows(kept, draft.path / FILE)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
        (draft.path / "rejected.jsonl").write_text("".join(lines), encoding="utf-8")
        draft.rows = len(kept)
        draft.counts = question_counts(candidates, kept, rejected)
    log.info("questions written", **read_manifest(paths.questions).counts)


def question_settings(settings: Settings) -> dict[str, Any]:
    """The settings that shape the questions."""
    trainer = settings.trainer
    names = ("seed", "round", "temperature", "max_turns", "turn_tokens", "max_tool_tokens", "search_top_k",
             "guided_tool_call", "prompts")  # fmt: skip
    answers = ("temperature", "max_new_tokens", "worked_examples")
    return {
        **{name: getattr(trainer, name) for name in names},
        "questions": trainer.questions.model_dump(mode="json"),
        "answers": {name: getattr(trainer.reward, name) for name in answers},
    }


def question_origin(settings: Settings, paths: RunPaths, barred: Collection[str]) -> dict[str, str]:
    """What the questions are made from, by identity."""
    return {
        "seeds": read_manifest(paths.seeds).identity,
        "index": read_manifest(paths.index).identity,
        "proposer": read_manifest(paths.weights).identity,
        "solver": weights_identity(resolve_model(settings.solver.model, settings)),
        "proposer_prompt": prompt_hash("proposer", settings.trainer.prompts),
        "solver_prompt": alone_hash(settings.trainer.prompts),
        "barred_pmids": hash_json(sorted(barred)),
    }


def read_rows(file: Path) -> list[Row]:
    """The rows of a Parquet file."""
    import pyarrow.parquet as pq

    return pq.read_table(file).to_pylist()  # type: ignore[no-any-return]


def read_candidate(row: Row) -> Candidate:
    """The question in a conversation of `candidates.py`."""
    proposal = read_proposal(row, hop=row["hop"], info=row)
    parts = format_parts(proposal)
    return Candidate(
        name=row["name"],
        pmid=row["pmid"],
        hop=row["hop"],
        question=proposal.question,
        answer=proposal.answer,
        hops=[{"queries": search["queries"], "pmids": search["pmids"]} for search in row["searches"]],
        evidence=proposal.evidence,
        sound=parts["integrity"] > 0,
        grounded=parts["answer"] > 0,
        cited=cited_pmids(f"{proposal.question}\n{proposal.cited_answer}"),
    )


# --- what is kept


def objection(candidate: Candidate, barred: Collection[str]) -> str:
    """Why a candidate is not worth checking, or ""."""
    if not candidate.sound:
        return "malformed"
    return "evaluation_paper" if not candidate.sources.isdisjoint(barred) else ""


def verdict(right_with: int, right_without: int, questions: QuestionSettings) -> str:
    """Why a checked candidate is no question for the solver, or ""."""
    if right_with < questions.min_with_evidence:
        return "not_answerable"
    return "known" if right_without > questions.max_without else ""


def select(
    candidates: Sequence[Candidate], checks: Mapping[str, Row], settings: Settings, barred: Collection[str]
) -> tuple[list[Row], list[Row]]:
    """The questions, as rows of the artifact, and the rejected candidates with their reasons; in the given order."""
    questions = settings.trainer.questions
    reasons: dict[str, str] = {}
    texts: list[str] = []
    for one in candidates:
        reasons[one.name] = objection(one, barred) or verdict(*right(one, checks[one.name]), questions)
        if not reasons[one.name] and likeness(one.question, texts) > questions.likeness:
            reasons[one.name] = "duplicate"
        if not reasons[one.name]:
            texts.append(one.question)
    papers = dict.fromkeys(one.pmid for one in candidates if not reasons[one.name])
    kept_out = papers_kept_out(
        list(papers), questions.held_out_share, f"{settings.trainer.seed} {settings.trainer.round}"
    )
    kept, rejected = [], []
    for one in candidates:
        held_out = one.pmid in kept_out
        if not reasons[one.name] and not held_out and not one.sources.isdisjoint(kept_out):
            reasons[one.name] = "held_out_paper"
        if reasons[one.name]:
            rejected.append({**described(one), "reason": reasons[one.name], **checks.get(one.name, {})})
        else:
            kept.append(question_row(one, right(one, checks[one.name]), questions.tries, held_out=held_out))
    return kept, rejected


def right(candidate: Candidate, check: Row) -> tuple[int, int]:
    """How many of the solver's answers were right, with evidence and without."""
    with_evidence, without = (
        sum(exact_match(answer, candidate.answer) for answer in check[kind]) for kind in ("with_evidence", "without")
    )
    return with_evidence, without


def papers_kept_out(papers: Sequence[str], share: float, seed: str) -> frozenset[str]:
    """The papers whose questions are kept for evaluation: `share` of them, of two or more at least one and not all."""
    count = min(max(1, round(share * len(papers))), len(papers) - 1) if papers else 0
    return frozenset(Random(seed).sample(papers, count))  # noqa: S311


def described(candidate: Candidate) -> Row:
    """What a reader wants to know of a candidate, kept or not."""
    return {
        "id": candidate.name,
        "pmid": candidate.pmid,
        "hop": candidate.hop,
        "question": candidate.question,
        "answer": candidate.answer,
        "hops": candidate.hops,
        "cited": list(candidate.cited),
    }


def question_row(candidate: Candidate, rights: tuple[int, int], tries: int, *, held_out: bool) -> Row:
    """A row of questions.parquet; `difficulty` is the share of wrong answers with the evidence before the solver."""
    return {
        **described(candidate),
        "split": HELD_OUT if held_out else TRAIN,
        "reasoning_type": reasoning_type(candidate.question),
        "grounded": candidate.grounded,
        "right_with_evidence": rights[0],
        "right_without": rights[1],
        "tries": tries,
        "difficulty": 1 - rights[0] / tries,
    }


def sources(row: Row) -> set[str]:
    """The papers that a row of questions.parquet rests on."""
    return {row["pmid"], *(pmid for hop in row["hops"] for pmid in hop["pmids"])}


def require_disjoint(rows: Sequence[Row], barred: Collection[str]) -> None:
    """Raise ArtifactError when a question rests on a barred paper, or one for training on a kept-out one."""
    kept_out = {row["pmid"] for row in rows if row["split"] == HELD_OUT}
    for row in rows:
        forbidden = set(barred) | (kept_out if row["split"] == TRAIN else set())
        found = sources(row) & forbidden
        if found:
            raise ArtifactError(
                f"question {row['id']} ({row['split']}) rests on PMID {min(found)}, which is kept for evaluation; "
                "expected none such: delete the questions and run the stage again"
            )


def question_counts(candidates: Sequence[Candidate], kept: Sequence[Row], rejected: Iterable[Row]) -> dict[str, int]:
    """Candidates, questions by split, and rejections by reason."""
    splits = Counter(row["split"] for row in kept)
    reasons = Counter(row["reason"] for row in rejected)
    return {
        "candidates": len(candidates),
        "train": splits[TRAIN],
        "held_out": splits[HELD_OUT],
        **{f"rejected_{reason}": count for reason, count in sorted(reasons.items())},
    }

"""Stage `seeds`: corpus → `train.parquet`, `held_out.parquet`, `questions.parquet`: rows as verl reads them.

Papers that qualify (length, MeSH, keywords, in no evaluation set, no double) are drawn with the run's seed, three kinds
that share no paper: `eval_seeds` are held out, the same in every round; `seeds` train the proposer of the round; from
`questions.papers` the trained proposer writes the solver's questions (`questions.py`). Papers of earlier rounds'
questions train no proposer, and papers that have trained one bring no question. Hops follow `hop_ratio` exactly, in all
and in every step. A document is cut until its whole prompt fits (`fitting.py`). What was left out is counted by reason.
Same corpus, settings and seed: the same bytes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import structlog

from services.trainer.evaluation_sets import evaluation_items
from services.trainer.fitting import FittedSeed, fit_in_children, prompt_of
from services.trainer.paths import RunPaths
from services.trainer.protocol import AGENT, SEARCH_TOOL, SOURCE, prompt_hash
from shared.command import UsageError
from shared.corpus import Corpus
from shared.files import hash_json, publish, stale_reason
from shared.model_files import resolve_model, weights_identity
from shared.pmids import read_pmids
from shared.records import Paper, Seed
from shared.settings import Settings, TrainerSettings


@dataclass(frozen=True, slots=True)
class Draw:
    """The drawn seeds, with whole documents, and how many papers were left out for which reason."""

    train: list[Seed]
    held_out: list[Seed]
    questions: list[Seed]
    left_out: dict[str, int]


def make_seeds(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Write the seeds artifact unless a current one is there."""
    trainer = settings.trainer
    corpus = Corpus(paths.corpus)
    model = resolve_model(trainer.actor.model, settings)
    excluded = barred_pmids(trainer)
    shape = seed_settings(trainer)
    origin = {
        "corpus": corpus.manifest.identity,
        "proposer_prompt": prompt_hash("proposer", trainer.prompts),
        "tool_schema": hash_json(SEARCH_TOOL),
        "tokenizer": weights_identity(model),
        "excluded_pmids": hash_json(sorted(excluded)),
    }
    reason = stale_reason(paths.seeds, settings=shape, made_from=origin)
    if reason is None:
        log.info("seeds reused", path=str(paths.seeds))
        return
    log.info("seeds are drawn", because=reason)
    with publish(paths.seeds, settings=shape, made_from=origin) as draft:
        draw = draw_seeds(corpus, trainer, excluded)
        fitted = fit_in_children([*draw.train, *draw.held_out, *draw.questions], trainer, model)
        remaining = iter(fitted)
        splits = {"train": draw.train, "held_out": draw.held_out, "questions": draw.questions}
        parts = {split: list(islice(remaining, len(seeds))) for split, seeds in splits.items()}
        for split, part in parts.items():
            write_rows([seed_row(one, trainer, split) for one in part], draft.path / f"{split}.parquet")
        draft.rows = len(fitted)
        draft.counts = {split: len(part) for split, part in parts.items()}
        draft.counts |= {f"left_out_{name}": count for name, count in draw.left_out.items()}
        draft.counts["shortened_to_fit"] = sum(one.shortened for one in fitted)
        draft.counts["prompt_tokens_max"] = max(one.prompt_tokens for one in fitted)
    log.info("seeds drawn", **draft.counts)


def seed_settings(trainer: TrainerSettings) -> dict[str, Any]:
    """The settings that shape the seeds; `seed` is that of the draw."""
    names = (
        "seed", "seeds", "eval_seeds", "min_abstract_words", "seed_mesh", "seed_keywords", "document_tokens",
        "prompt_tokens", "hop_ratio", "prompts_per_step", "worked_examples", "round",
    )  # fmt: skip
    shape = {name: getattr(trainer, name) for name in names}
    return shape | {"model": trainer.actor.model, "question_papers": trainer.questions.papers}


def barred_pmids(trainer: TrainerSettings) -> frozenset[str]:
    """Papers that neither seeds nor questions may come from: those of every evaluation set."""
    listed = read_pmids(trainer.exclude_pmids, "DRZERO_TRAINER__EXCLUDE_PMIDS")
    return listed | {pmid for item in evaluation_items(trainer.evaluation) for pmid in item.papers}


# --- which papers


def qualifying_rows(
    papers: Iterable[Paper], trainer: TrainerSettings, excluded: frozenset[str]
) -> tuple[list[int], dict[str, int]]:
    """Rows of the papers that may be seeds, in order, and the number of others by reason."""
    objection = paper_filter(trainer)
    left_out: Counter[str] = Counter()
    row_of: dict[str, int] = {}  # content → row
    pmids: set[str] = set()
    barred: set[str] = set()
    for row, paper in enumerate(papers):
        content = hash_json(normalised(paper.text))
        reason = objection(paper)
        if paper.pmid in excluded:
            barred.add(content)
            reason = "excluded"
        elif not reason and (paper.pmid in pmids or content in row_of):
            reason = "double"
        if reason:
            left_out[reason] += 1
        else:
            pmids.add(paper.pmid)
            row_of[content] = row
    # The same paper under another id would leak an evaluation set; it may stand before the one that is named.
    twins = barred & row_of.keys()
    left_out["excluded"] += len(twins)
    return [row for content, row in row_of.items() if content not in twins], dict(+left_out)


def paper_filter(trainer: TrainerSettings) -> Callable[[Paper], str]:
    """A function that says why a paper is no seed by its own content, or ""."""
    mesh = {term.strip().casefold() for term in trainer.seed_mesh} - {""}
    words = [re.escape(word.strip()) for word in trainer.seed_keywords if word.strip()]
    keyword = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE) if words else None

    def objection(paper: Paper) -> str:
        if len(paper.abstract.split()) < trainer.min_abstract_words:
            return "short_abstract"
        if mesh and mesh.isdisjoint(map(descriptor, paper.mesh_terms)):
            return "other_mesh"
        if keyword and not keyword.search(paper.text):
            return "no_keyword"
        return ""

    return objection


def descriptor(mesh_term: str) -> str:
    """The descriptor of a MeSH term, in lower case: `*Neoplasms/drug therapy*` → `neoplasms`."""
    return mesh_term.partition("/")[0].replace("*", "").strip().casefold()


def normalised(text: str) -> str:
    """The words of a text in lower case with single spaces: what two prints of one paper have in common."""
    return " ".join(re.findall(r"\w+", text.casefold()))


# --- the draw


def draw_seeds(corpus: Sequence[Paper] | Corpus, trainer: TrainerSettings, excluded: frozenset[str]) -> Draw:
    """The seeds of a round; raises UsageError when the corpus has too few papers that qualify."""
    fit, left_out = qualifying_rows(corpus, trainer, excluded)
    rows = draw_rows(fit, trainer)
    if rows is None:
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(left_out.items())) or "none"
        wanted = trainer.seeds + trainer.eval_seeds + trainer.questions.papers
        unused = f", after those that rounds before {trainer.round} have used" if trainer.round > 1 else ""
        raise UsageError(
            f"expected {wanted} papers that qualify as seeds (DRZERO_TRAINER__SEEDS {trainer.seeds}, EVAL_SEEDS "
            f"{trainer.eval_seeds}, QUESTIONS__PAPERS {trainer.questions.papers}){unused}, found {len(fit)} of "
            f"{len(corpus)} (left out: {reasons}); ingest more papers, lower these or "
            "DRZERO_TRAINER__MIN_ABSTRACT_WORDS, or widen DRZERO_TRAINER__SEED_MESH or DRZERO_TRAINER__SEED_KEYWORDS"
        )

    def seeds(split: str, batch: int) -> list[Seed]:
        hops = spread_hops(len(rows[split]), trainer.hop_ratio, batch)
        papers = map(corpus.__getitem__, rows[split])
        pairs = enumerate(zip(papers, hops, strict=True))
        return [Seed(index, paper.pmid, hop, paper.contents) for index, (paper, hop) in pairs]

    train, held_out = seeds("train", trainer.prompts_per_step), seeds("held_out", trainer.eval_seeds)
    return Draw(train, held_out, seeds("questions", trainer.questions.papers), left_out)


def draw_rows(fit: Sequence[int], trainer: TrainerSettings) -> dict[str, list[int]] | None:
    """Rows by split for `trainer.round`, or None when there are too few.

    Rounds draw one after the other, each knowing the ones before, so that a further round changes no earlier one.
    """
    wanted = trainer.questions.papers
    held_out = Random(trainer.seed).sample(fit, min(trainer.eval_seeds, len(fit)))  # noqa: S311
    asked, trained = set(held_out), set[int]()
    for number in range(1, trainer.round + 1):
        draw = Random(f"{trainer.seed} {number}")  # noqa: S311
        may_train = [row for row in fit if row not in asked]
        if len(may_train) < trainer.seeds + wanted:
            return None
        train = draw.sample(may_train, trainer.seeds)
        trained |= set(train)
        may_ask = [row for row in may_train if row not in trained]
        if len(may_ask) < wanted:
            return None
        questions = draw.sample(may_ask, wanted)
        asked |= set(questions)
    return {"train": train, "held_out": held_out, "questions": questions}


def spread_hops(count: int, ratio: Sequence[int], batch: int) -> list[int]:
    """`count` hop numbers in the given ratio of 1, 2, 3, … hops, the same in every batch.

    All in all they are the ratio's largest-remainder apportionment. A batch has each hop's share, rounded down or up;
    up goes where most is owed by then.
    """
    total, goal = sum(ratio), _apportion(count, ratio)
    given = [0] * len(ratio)
    hops: list[int] = []
    for start in range(0, count, batch):
        size = min(batch, count - start)
        counts = [size * part // total for part in ratio]
        given = [before + now for before, now in zip(given, counts, strict=True)]
        owed = [(start + size) * whole - count * so_far for whole, so_far in zip(goal, given, strict=True)]
        rounded = [hop for hop, part in enumerate(ratio) if size * part % total]
        for hop in sorted(rounded, key=owed.__getitem__, reverse=True)[: size - sum(counts)]:
            counts[hop] += 1
            given[hop] += 1
        hops += _interleaved(counts)
    return hops


def _apportion(count: int, ratio: Sequence[int]) -> list[int]:
    """Largest remainder; of equal remainders the fewer hops first."""
    total = sum(ratio)
    counts = [count * part // total for part in ratio]
    order = sorted(range(len(ratio)), key=lambda hop: count * ratio[hop] % total, reverse=True)
    for hop in order[: count - sum(counts)]:
        counts[hop] += 1
    return counts


def _interleaved(counts: Sequence[int]) -> list[int]:
    """Hop numbers in an even order: the k-th of n equal ones has its place at (k + ½)/n."""
    places = [((k + 0.5) / n, hop) for hop, n in enumerate(counts, start=1) for k in range(n)]
    return [hop for _, hop in sorted(places)]


# --- rows


def seed_row(fitted: FittedSeed, trainer: TrainerSettings, split: str) -> dict[str, Any]:
    """One row in verl's columns; `need_tools_kwargs` and friends keep other readers of this format working."""
    seed = fitted.seed
    source = f"{SOURCE}{seed.hop}"
    create = {"ground_truth": "", "question": "", "data_source": source}
    return {
        "data_source": source,
        "prompt": prompt_of(seed, trainer),
        "ability": "propose",
        "agent_name": AGENT,
        "reward_model": {"style": "rule", "ground_truth": ""},
        "extra_info": {
            "index": seed.index,
            "split": split,
            "pmid": seed.pmid,
            "hop": seed.hop,
            "document": seed.document,
            "draw_seed": trainer.seed,
            "prompt_tokens": fitted.prompt_tokens,
            "need_tools_kwargs": True,
            "tools_kwargs": {"search": {"create_kwargs": create}},
        },
    }


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)

"""Stage `seeds`: corpus → `seeds/train.parquet` and `seeds/held_out.parquet`, the rows verl reads.

Papers that qualify (length, MeSH, keywords, in no evaluation set, no double) are drawn with the run's seed: the first
`eval_seeds` are held out, the next `seeds` train. Hops follow `hop_ratio` exactly, in all and in every step. A document
is cut until its whole prompt fits (`fitting.py`). What was left out is counted by reason. Same corpus, settings and
seed: the same bytes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import structlog

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
    left_out: dict[str, int]


def make_seeds(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Write the seeds artifact unless a current one is there."""
    trainer = settings.trainer
    corpus = Corpus(paths.corpus)
    model = resolve_model(trainer.actor.model, settings)
    excluded = read_pmids(trainer.exclude_pmids, "DRZERO_TRAINER__EXCLUDE_PMIDS")
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
        fitted = fit_in_children([*draw.train, *draw.held_out], trainer, model)
        parts = {"train": fitted[: trainer.seeds], "held_out": fitted[trainer.seeds :]}
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
        "prompt_tokens", "hop_ratio", "prompts_per_step", "worked_examples",
    )  # fmt: skip
    return {name: getattr(trainer, name) for name in names} | {"model": trainer.actor.model}


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
    """Training and held-out seeds; raises UsageError when the corpus has too few papers that qualify."""
    fit, left_out = qualifying_rows(corpus, trainer, excluded)
    wanted = trainer.seeds + trainer.eval_seeds
    if len(fit) < wanted:
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(left_out.items())) or "none"
        raise UsageError(
            f"expected {wanted} papers that qualify as seeds, found {len(fit)} of {len(corpus)} (left out: {reasons}); "
            "ingest more papers, lower DRZERO_TRAINER__SEEDS or DRZERO_TRAINER__MIN_ABSTRACT_WORDS, or widen "
            "DRZERO_TRAINER__SEED_MESH or DRZERO_TRAINER__SEED_KEYWORDS"
        )
    rows = Random(trainer.seed).sample(fit, wanted)  # noqa: S311

    def seeds(rows: list[int], batch: int) -> list[Seed]:
        hops = spread_hops(len(rows), trainer.hop_ratio, batch)
        papers = map(corpus.__getitem__, rows)
        pairs = enumerate(zip(papers, hops, strict=True))
        return [Seed(index, paper.pmid, hop, paper.contents) for index, (paper, hop) in pairs]

    held_out, train = rows[: trainer.eval_seeds], rows[trainer.eval_seeds :]
    return Draw(seeds(train, trainer.prompts_per_step), seeds(held_out, trainer.eval_seeds), left_out)


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

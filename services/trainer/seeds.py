"""Stage `seeds`: corpus → `seeds/train.parquet` and `seeds/held_out.parquet`, the rows verl reads.

Papers with a long enough abstract are shuffled with the run's seed; the first `eval_seeds` are held out, the next
`seeds` train, disjoint by PMID. Hops follow `hop_ratio` exactly (largest remainder), spread evenly over the order, so
that every step sees its share. Documents are cut to `document_tokens` of the trained model's own tokenizer.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from services.trainer.paths import RunPaths
from services.trainer.protocol import AGENT, prompt_hash, proposer_messages
from shared.command import UsageError
from shared.corpus import Corpus
from shared.files import publish, read_manifest, stale_reason
from shared.model_files import resolve_model
from shared.records import Paper, Seed
from shared.settings import Settings, TrainerSettings


def make_seeds(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Write the seeds artifact unless a current one is there."""
    trainer = settings.trainer
    shape = seed_settings(trainer)
    origin = {"corpus": read_manifest(paths.corpus).identity, "proposer_prompt": prompt_hash("proposer")}
    reason = stale_reason(paths.seeds, settings=shape, made_from=origin)
    if reason is None:
        log.info("seeds reused", path=str(paths.seeds))
        return
    log.info("seeds are drawn", because=reason)
    cut = token_cutter(resolve_model(trainer.actor.model, settings), trainer.document_tokens)
    train, held_out = draw_seeds(Corpus(paths.corpus), trainer, cut)
    with publish(paths.seeds, settings=shape, made_from=origin) as draft:
        for name, seeds in (("train", train), ("held_out", held_out)):
            rows = [seed_row(seed, name, trainer.worked_examples) for seed in seeds]
            write_rows(rows, str(draft.path / f"{name}.parquet"))
        draft.rows = len(train) + len(held_out)
        draft.counts = {"train": len(train), "held_out": len(held_out)}
    log.info("seeds drawn", **draft.counts)


def seed_settings(trainer: TrainerSettings) -> dict[str, Any]:
    """The settings that shape the seeds."""
    names = ("seed", "seeds", "eval_seeds", "min_abstract_words", "document_tokens", "hop_ratio", "worked_examples")
    return {name: getattr(trainer, name) for name in names} | {"model": trainer.actor.model}


def draw_seeds(
    corpus: Sequence[Paper] | Corpus, trainer: TrainerSettings, cut: Callable[[str], str]
) -> tuple[list[Seed], list[Seed]]:
    """Training and held-out seeds; raises UsageError when the corpus has too few papers that qualify."""
    fit = [row for row, paper in enumerate(corpus) if len(paper.abstract.split()) >= trainer.min_abstract_words]
    wanted = trainer.seeds + trainer.eval_seeds
    if len(fit) < wanted:
        raise UsageError(
            f"expected {wanted} papers with at least {trainer.min_abstract_words} words of abstract, found {len(fit)} "
            f"of {len(corpus)}; ingest more papers, or lower DRZERO_TRAINER__SEEDS or __MIN_ABSTRACT_WORDS"
        )
    rows = random.Random(trainer.seed).sample(fit, wanted)  # noqa: S311
    held_out, train = rows[: trainer.eval_seeds], rows[trainer.eval_seeds :]

    def seeds(rows: list[int]) -> list[Seed]:
        hops = spread_hops(len(rows), trainer.hop_ratio)
        papers = [corpus[row] for row in rows]
        pairs = zip(papers, hops, strict=True)
        return [Seed(i, p.pmid, hop, cut(f"{p.title}\n{p.abstract}")) for i, (p, hop) in enumerate(pairs)]

    return seeds(train), seeds(held_out)


def spread_hops(count: int, ratio: Sequence[int]) -> list[int]:
    """`count` hop numbers in the given ratio of 1, 2, 3, … hops, evenly interleaved.

    Largest-remainder apportionment; the order places the k-th of n equal items at (k + ½)/n.
    """
    total = sum(ratio)
    shares = [count * part / total for part in ratio]
    counts = [int(share) for share in shares]
    for hop in sorted(range(len(ratio)), key=lambda h: shares[h] - counts[h], reverse=True)[: count - sum(counts)]:
        counts[hop] += 1
    places = [((k + 0.5) / n, hop) for hop, n in enumerate(counts, start=1) for k in range(n)]
    return [hop for _, hop in sorted(places)]


def seed_row(seed: Seed, split: str, examples: int) -> dict[str, Any]:
    """One row in verl's columns; `need_tools_kwargs` and friends keep other readers of this format working."""
    source = f"search_biomedical_{seed.hop}"
    create = {"ground_truth": "", "question": "", "data_source": source}
    return {
        "data_source": source,
        "prompt": proposer_messages(seed, examples),
        "ability": "propose",
        "agent_name": AGENT,
        "reward_model": {"style": "rule", "ground_truth": ""},
        "extra_info": {
            "index": seed.index,
            "split": split,
            "pmid": seed.pmid,
            "hop": seed.hop,
            "document": seed.document,
            "need_tools_kwargs": True,
            "tools_kwargs": {"search": {"create_kwargs": create}},
        },
    }


def write_rows(rows: list[dict[str, Any]], path: str) -> None:
    """Write rows as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def token_cutter(model: str, tokens: int) -> Callable[[str], str]:
    """A function that cuts a text to its first `tokens` tokens. `model` is a folder or a Hugging Face id."""
    from tokenizers import Tokenizer  # not transformers: that would keep torch in memory for the whole run

    file = Path(model) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(model)

    def cut(text: str) -> str:
        ends = tokenizer.encode(text, add_special_tokens=False).offsets
        return text if len(ends) <= tokens else text[: ends[tokens - 1][1]]

    return cut

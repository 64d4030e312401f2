"""Stage `solver_seeds`: the round's questions → `solver/seeds/train.parquet` and `held_out.parquet` as verl reads them.

One row per question with the solver's prompt, tool and gold answer. A question whose prompt does not fit is left out
and counted. That no paper of an evaluation set or of a kept-out question stands behind a training row is checked once
more here, because it is what makes the evaluation worth reading.
"""

from random import Random
from typing import Any

import structlog

from services.trainer.fitting import child_processes, prompt_lengths
from services.trainer.journal import Row
from services.trainer.paths import RunPaths
from services.trainer.protocol import AGENT, SEARCH_TOOL, SOURCE, prompt_hash, solver_messages
from services.trainer.questions import FILE, read_rows, require_disjoint
from services.trainer.records import HELD_OUT, TRAIN
from services.trainer.seeds import barred_pmids, write_rows
from shared.command import UsageError
from shared.files import hash_json, publish, read_manifest, stale_reason
from shared.model_files import resolve_model, weights_identity
from shared.settings import Settings, TrainerSettings


def make_solver_seeds(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Write the rows unless the current ones are there. `settings` are those of the round's solver."""
    trainer = settings.trainer
    model = resolve_model(trainer.actor.model, settings)
    names = ("seed", "prompt_tokens", "worked_examples", "eval_seeds", "prompts_per_step")
    shape = {name: getattr(trainer, name) for name in names}
    origin = {
        "questions": read_manifest(paths.questions).identity,
        "solver_prompt": prompt_hash("solver", trainer.prompts),
        "tool_schema": hash_json(SEARCH_TOOL),
        "tokenizer": weights_identity(model),
    }
    if stale_reason(paths.seeds, settings=shape, made_from=origin) is None:
        log.info("solver's seeds reused", path=str(paths.seeds))
        return
    questions = read_rows(paths.questions / FILE)
    require_disjoint(questions, barred_pmids(trainer))
    prompts = [solver_messages(row["question"], trainer.prompts, trainer.worked_examples) for row in questions]
    with child_processes(1) as child:
        lengths = child.submit(prompt_lengths, model, prompts).result()
    rows = [
        solver_row(row, prompt, length, trainer)
        for row, prompt, length in zip(questions, prompts, lengths, strict=True)
        if length <= trainer.prompt_tokens
    ]
    splits = {split: numbered(rows, split, trainer.seed) for split in (TRAIN, HELD_OUT)}
    splits[HELD_OUT] = splits[HELD_OUT][: trainer.eval_seeds]
    require_enough(splits, trainer)
    with publish(paths.seeds, settings=shape, made_from=origin) as draft:
        for split, part in splits.items():
            write_rows(part, draft.path / f"{split}.parquet")
        draft.rows = sum(map(len, splits.values()))
        draft.counts = {split: len(part) for split, part in splits.items()}
        draft.counts["too_long"] = len(questions) - len(rows)
    log.info("solver's seeds made", **draft.counts)


def solver_row(question: Row, prompt: list[dict[str, Any]], length: int, trainer: TrainerSettings) -> dict[str, Any]:
    """One row in verl's columns."""
    source = f"{SOURCE}{question['hop']}"
    create = {"ground_truth": question["answer"], "question": question["question"], "data_source": source}
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": "solve",
        "agent_name": AGENT,
        "reward_model": {"style": "rule", "ground_truth": question["answer"]},
        "extra_info": {
            "index": 0,  # see `numbered`
            "split": question["split"],
            "pmid": question["pmid"],
            "hop": question["hop"],
            "question": question["question"],
            "answer": question["answer"],
            "draw_seed": trainer.seed,
            "prompt_tokens": length,
            "need_tools_kwargs": True,
            "tools_kwargs": {"search": {"create_kwargs": create}},
        },
    }


def numbered(rows: list[Row], split: str, seed: int) -> list[Row]:
    """The rows of a split in random order, so that a step's questions come from many papers; each has its `index`."""
    chosen = [row for row in rows if row["extra_info"]["split"] == split]
    shuffled = Random(seed).sample(chosen, len(chosen))  # noqa: S311
    return [{**row, "extra_info": {**row["extra_info"], "index": index}} for index, row in enumerate(shuffled)]


def require_enough(splits: dict[str, list[Row]], trainer: TrainerSettings) -> None:
    """Raise UsageError when too many questions were too long."""
    needed = {TRAIN: trainer.prompts_per_step, HELD_OUT: trainer.eval_seeds}
    for split, rows in splits.items():
        if len(rows) < needed[split]:
            raise UsageError(
                f"expected {needed[split]} questions ({split}) whose prompt has at most "
                f"DRZERO_TRAINER__SOLVER__PROMPT_TOKENS = {trainer.prompt_tokens} tokens, found {len(rows)}; raise it "
                "or lower DRZERO_TRAINER__REWARD__WORKED_EXAMPLES"
            )

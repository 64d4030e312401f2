"""What must hold before verl starts: `check_training(settings, paths)`, called by the stage `train`.

Looks at the settings' arithmetic, the seed files, the weights that it starts from, by hash, and the models
(`templates.py`), changes nothing, and raises one UsageError that lists every problem with expected, found and the
variable to change. What is allowed but worth knowing is logged.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import structlog

from services.trainer.fitting import child_processes
from services.trainer.paths import RunPaths
from services.trainer.protocol import SOURCE
from services.trainer.rounds import Role, paths_of
from services.trainer.templates import model_problems
from shared.command import UsageError
from shared.files import ArtifactError, read_manifest
from shared.model_files import resolve_model
from shared.serving import checked_weights
from shared.settings import Settings, TrainerSettings

COLUMNS = frozenset({"data_source", "prompt", "ability", "agent_name", "reward_model", "extra_info"})
COMMON = ("index", "split", "pmid", "hop", "draw_seed", "prompt_tokens", "need_tools_kwargs", "tools_kwargs")
EXTRA = {"proposer": frozenset({*COMMON, "document"}), "solver": frozenset({*COMMON, "question", "answer"})}


def check_training(settings: Settings, paths: RunPaths) -> None:
    """Raise UsageError when a training with these settings and seeds would fail or silently train on something else."""
    # In children, because neither transformers nor the rows of a large draw should stay in memory during training.
    with child_processes(1) as reader, child_processes(1) as child:
        in_seed_files = reader.submit(seed_file_problems, paths.seeds, settings.trainer)
        in_models = weights_problems(settings) or model_problems(settings, child)
        problems = [*arithmetic_problems(settings), *in_seed_files.result(), *in_models]
    if problems:
        raise UsageError("\n- ".join([f"training cannot start, {len(problems)} to mend:", *problems]))
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    for note in training_notes(settings):
        log.info("worth knowing before training", note=note)


# --- weights


def weights_problems(settings: Settings) -> list[str]:
    """What is wrong with the weights of proposer and solver: files without their hashes, or a folder of another run."""
    problems = []
    for model in sorted({settings.trainer.actor.model, settings.solver.model}):
        try:
            checked_weights(resolve_model(model, settings))
            if settings.trainer.round > 1:
                require_origin(model, settings)
        except ArtifactError as error:
            problems.append(str(error))
    return problems


def require_origin(model: str, settings: Settings) -> None:
    """Raise ArtifactError when `model` is where a role's weights of the round before are, and others lie there."""
    for role in get_args(Role):
        before = paths_of(settings, settings.trainer.round - 1, role)
        if model == str(before.weights):
            expected = read_manifest(before.training).identity
            found = read_manifest(before.weights).made_from.get("training", "none")
            if found != expected:
                stage = "publish" if role == "proposer" else "solver_publish"
                raise ArtifactError(
                    f"expected the weights of training {expected[:12]} in {model}, found those of {found[:12]}; run "
                    f"again from {settings.trainer.round - 1}.{stage}"
                )


# --- settings


def arithmetic_problems(settings: Settings) -> list[str]:
    """What is wrong with the numbers alone."""
    trainer, solver = settings.trainer, settings.solver
    problems = batch_problems(trainer)
    if trainer.turn_tokens > trainer.response_tokens:
        problems.append(
            f"expected DRZERO_TRAINER__TURN_TOKENS of at most DRZERO_TRAINER__RESPONSE_TOKENS = "
            f"{trainer.response_tokens}, found {trainer.turn_tokens}; lower the one or raise the other"
        )
    first = trainer.turn_tokens + trainer.max_tool_tokens
    if most_hops(trainer) > 1 and trainer.max_turns > 1 and first >= trainer.response_tokens:
        problems.append(
            f"expected a first turn (DRZERO_TRAINER__TURN_TOKENS = {trainer.turn_tokens}) and one search result "
            f"(DRZERO_TRAINER__MAX_TOOL_TOKENS = {trainer.max_tool_tokens}) to leave room for an answer, found "
            f"DRZERO_TRAINER__RESPONSE_TOKENS = {trainer.response_tokens}; raise it above {first}"
        )
    if trainer.reward.max_new_tokens >= solver.context_tokens:
        problems.append(
            f"expected DRZERO_TRAINER__REWARD__MAX_NEW_TOKENS below DRZERO_SOLVER__CONTEXT_TOKENS = "
            f"{solver.context_tokens}, found {trainer.reward.max_new_tokens}; lower the one or raise the other"
        )
    return problems


def batch_problems(trainer: TrainerSettings) -> list[str]:
    """What verl's batches and the advantage demand of a step's rollouts."""
    actor, problems = trainer.actor, []
    rollouts = trainer.prompts_per_step * trainer.rollouts_per_prompt
    micro_batch = 1 if actor.packed else actor.micro_batch  # packed, passes are filled by tokens
    portion = actor.gpus * actor.nodes * micro_batch
    if rollouts % portion:
        problems.append(
            f"expected the rollouts of a step to be a multiple of gpus × nodes × micro-batch = {actor.gpus} × "
            f"{actor.nodes} × {micro_batch} = {portion}, found {trainer.prompts_per_step} × "
            f"{trainer.rollouts_per_prompt} = {rollouts}; change {variable('PROMPTS_PER_STEP', trainer)}, "
            f"{variable('ROLLOUTS_PER_PROMPT', trainer)} or DRZERO_TRAINER__ACTOR__MICRO_BATCH"
        )
    if trainer.advantage == "grpo" and trainer.rollouts_per_prompt == 1:
        problems.append(
            "expected at least 2 rollouts per prompt with grpo, which compares the rollouts of one prompt, found 1; "
            "raise DRZERO_TRAINER__ROLLOUTS_PER_PROMPT or set DRZERO_TRAINER__ADVANTAGE=hrpo"
        )
    return problems


def training_notes(settings: Settings) -> list[str]:
    """What is allowed and may surprise."""
    trainer, reward = settings.trainer, settings.trainer.reward
    notes = []
    steps = trainer.seeds // trainer.prompts_per_step
    if trainer.steps > steps:
        notes.append(f"{trainer.steps} steps pass {trainer.steps / steps:.1f} times over seeds for {steps} steps")
    if trainer.max_turns < most_hops(trainer):
        notes.append(
            f"{most_hops(trainer)} hops need as many turns at one search a turn; "
            f"DRZERO_TRAINER__MAX_TURNS is {trainer.max_turns}"
        )
    longest = trainer.max_turns * trainer.turn_tokens + (trainer.max_turns - 1) * trainer.max_tool_tokens
    if longest > trainer.response_tokens:
        notes.append(
            f"a rollout that uses all its turns may have {longest} tokens and is cut at "
            f"DRZERO_TRAINER__RESPONSE_TOKENS = {trainer.response_tokens}"
        )
    longest = reward.max_turns * reward.max_new_tokens + (reward.max_turns - 1) * reward.max_tool_tokens
    if longest > settings.solver.context_tokens:
        notes.append(
            f"an attempt that uses all its turns may have {longest} tokens besides its prompt and ends at "
            f"DRZERO_SOLVER__CONTEXT_TOKENS = {settings.solver.context_tokens}"
        )
    return notes


def most_hops(trainer: TrainerSettings) -> int:
    """The largest number of hops that is drawn."""
    return max(hop for hop, part in enumerate(trainer.hop_ratio, start=1) if part)


# --- seed files


def seed_file_problems(folder: Path, trainer: TrainerSettings) -> list[str]:
    """What is wrong with the rows that verl is to read."""
    again = f"delete {folder} and run the same command again"
    problems: list[str] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "held_out"):
        path = folder / f"{split}.parquet"
        try:
            rows[split] = read_rows(path, EXTRA[trainer.role])
            found = row_problems(rows[split], trainer, split)
        except ArtifactError as error:
            found = [str(error)]
        problems += [f"{path}: {problem}; {again}" for problem in found]
    if len(rows) == 2:
        shared = {row["extra_info"]["pmid"] for row in rows["train"]} & {
            row["extra_info"]["pmid"] for row in rows["held_out"]
        }
        if shared:
            problems.append(
                f"{folder}: expected no PMID in both files, found {len(shared)}, e.g. {min(shared)}; {again}"
            )
    return problems


def read_rows(path: Path, expected: frozenset[str]) -> list[dict[str, Any]]:
    """The rows of a seed file; ArtifactError when it is missing, or has other columns or fields than `expected`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ArtifactError("expected this file, found none")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ArtifactError(f"expected Parquet, found something else ({error})") from error
    columns = set(table.column_names)
    if columns != COLUMNS:
        raise ArtifactError(f"expected the columns {_listed(COLUMNS)}, found {_listed(columns)}")
    extra = table.schema.field("extra_info").type
    fields: set[str] = {field.name for field in extra} if pa.types.is_struct(extra) else set()
    if fields != expected:
        raise ArtifactError(f"expected the fields {_listed(expected)} in extra_info, found {_listed(fields)}")
    return table.to_pylist()  # type: ignore[no-any-return]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def row_problems(rows: Sequence[dict[str, Any]], trainer: TrainerSettings, split: str) -> list[str]:
    """What is wrong with the rows of one file, each kind of problem once with its first row."""
    problems = []
    rules: dict[str, Callable[[dict[str, Any]], bool]] = {
        "the hop at the end of data_source": lambda row: row["data_source"] == f"{SOURCE}{row['extra_info']['hop']}",
        "messages with a role and a text in prompt": lambda row: _is_prompt(row["prompt"]),
        f"prompt_tokens of at most {variable('PROMPT_TOKENS', trainer)} = {trainer.prompt_tokens}": lambda row: (
            0 < row["extra_info"]["prompt_tokens"] <= trainer.prompt_tokens
        ),
        "tools_kwargs with arguments for the tool search": lambda row: _offers_search(row["extra_info"]),
        f"draw_seed = DRZERO_TRAINER__SEED = {trainer.seed}": lambda row: (
            row["extra_info"]["draw_seed"] == trainer.seed
        ),
    }
    for rule, holds in rules.items():
        wrong = [number for number, row in enumerate(rows) if not holds(row)]
        if wrong:
            problems.append(f"expected {rule} in every row, found {len(wrong)} rows without, the first is {wrong[0]}")
    last = "EVAL_QUESTIONS" if trainer.role == "solver" else "EVAL_SEEDS"
    needed, name = (trainer.prompts_per_step, "PROMPTS_PER_STEP") if split == "train" else (trainer.eval_seeds, last)
    if len(rows) < needed:
        problems.append(f"expected at least {variable(name, trainer)} = {needed} rows, found {len(rows)}")
    if trainer.role == "proposer":
        problems += uneven_hops([row["extra_info"]["hop"] for row in rows], trainer.hop_ratio, needed)
    return problems


def variable(name: str, trainer: TrainerSettings) -> str:
    """The variable of a setting that each role has its own of."""
    return f"DRZERO_TRAINER__{'SOLVER__' if trainer.role == 'solver' else ''}{name}"


def _is_prompt(messages: Any) -> bool:
    return bool(messages) and all(
        set(message) == {"role", "content"} and message["role"] and message["content"] for message in messages
    )


def _offers_search(extra: dict[str, Any]) -> bool:
    tool = (extra["tools_kwargs"] or {}).get("search") or {}
    return bool(extra["need_tools_kwargs"] and tool.get("create_kwargs"))


def uneven_hops(hops: Sequence[int], ratio: Sequence[int], batch: int) -> list[str]:
    """Says which batch of `batch` seeds first differs by more than 1 from the ratio's share of a hop."""
    total = sum(ratio)
    for start in range(0, len(hops) - batch + 1, batch):
        counts = [hops[start : start + batch].count(hop) for hop in range(1, len(ratio) + 1)]
        if any(abs(count * total - batch * part) > total for count, part in zip(counts, ratio, strict=True)):
            wanted = ":".join(map(str, ratio))
            return [
                f"expected hops in the ratio DRZERO_TRAINER__HOP_RATIO = {wanted} in every {batch} rows, found "
                f"{':'.join(map(str, counts))} from row {start} on"
            ]
    return []

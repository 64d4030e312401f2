"""Stages `train` and `solver_train`: seeds + services → a trained model of the settings' role, by verl in a child.

This file starts verl with the overrides of `overrides.py`, follows what it writes, and decides: a crash is resumed
from the newest checkpoint up to `trainer.restarts` times; an outage that outlasted the patience, a stall, or a further
crash ends the stage with a sentence, and so does a person who asks for it (`control.py`). Killed at any
moment and started again, it goes on at the newest checkpoint. The finished record is published as the artifact
`training`; checkpoints stay in scratch.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from services.trainer.checkpoints import discard_incomplete, go_back, newest_checkpoint, prune
from services.trainer.checks import check_training
from services.trainer.control import Stopped, requested
from services.trainer.outage import read_outage
from services.trainer.overrides import cluster_overrides, verl_overrides
from services.trainer.paths import RunPaths
from services.trainer.protocol import AGENT, SEARCH_TOOL, prompt_hash
from services.trainer.publish import publish_last_good
from services.trainer.records import (
    HELD_OUT,
    TRAIN,
    Verdict,
    compact,
    read_metrics,
    read_refusals,
    read_verdicts,
    seconds_trained,
    valid_only,
)
from services.trainer.verl_main import PARENT
from services.trainer.watch import Problem, Watch
from shared.command import UsageError
from shared.files import hash_json, publish, read_manifest, require_free_space, stale_reason, write_atomically
from shared.model_files import resolve_model, weights_identity
from shared.settings import Settings, TrainerSettings, as_environment

ROOT = Path(__file__).parents[2]
POLL_S = 1.0
TERM_S = 20.0


def train(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Train unless a finished training of just these settings and inputs is there."""
    shape, origin = training_settings(settings), training_origin(settings, paths)
    reason = stale_reason(paths.training, settings=shape, made_from=origin)
    if reason is None:
        log.info("training reused", path=str(paths.training))
        return
    require_free_space(settings.storage.scratch_dir, settings.storage.min_free_gb)
    check_training(settings, paths)
    log.info("training", because=reason)
    begin_or_resume(paths, hash_json([shape, origin]), log)
    run_to_the_end(settings, paths, log)
    publish_record(settings, paths, shape, origin)
    prune(paths.checkpoints, 1)
    log.info("training finished", seconds=round(seconds_trained(paths.log)))


def training_settings(settings: Settings) -> dict[str, Any]:
    """The settings that shape what is trained; addresses, patience and numbers of workers do not."""
    trainer = settings.trainer
    neutral = {
        "run", "iterations", "price_per_hour", "host", "port", "agent_workers", "reward_workers", "storage_units",
        "save_every", "keep_checkpoints", "patience_s", "start_patience_s", "rollout_deadline_s", "stall_s",
        "object_store_gb", "restarts", "max_refusals", "guards", "actor", "reward", "questions", "solver", "evaluation",
    }  # fmt: skip
    patience = {"concurrency", "attempt_deadline_s", "question_deadline_s"}
    shape = trainer.model_dump(mode="json", exclude=neutral)
    shape["actor"] = trainer.actor.model_dump(mode="json", exclude={"rollout_threads", "kv_tokens"})
    shape["reward"] = trainer.reward.model_dump(mode="json", exclude=patience)
    shape["solver"] = {"model": settings.solver.model}
    return shape


def training_origin(settings: Settings, paths: RunPaths) -> dict[str, str]:
    """What the training is made from, by identity; raises ArtifactError when seeds or index are missing."""
    origin = {
        "seeds": read_manifest(paths.seeds).identity,
        "index": read_manifest(paths.index).identity,
        "base_weights": weights_identity(resolve_model(settings.trainer.actor.model, settings)),
        "solver_prompt": prompt_hash("solver", settings.trainer.prompts),
    }
    if settings.trainer.role == "proposer":
        origin["solver_weights"] = weights_identity(resolve_model(settings.solver.model, settings))
    return origin


def begin_or_resume(paths: RunPaths, key: str, log: structlog.stdlib.BoundLogger) -> None:
    """Keep the scratch files of an interrupted training of the same key; remove those of any other."""
    state = paths.work / "state.json"
    if state.is_file() and json.loads(state.read_text(encoding="utf-8"))["key"] == key:
        log.info("an interrupted training is resumed", folder=str(paths.work))
    else:
        shutil.rmtree(paths.work, ignore_errors=True)
        write_atomically(state, json.dumps({"key": key}), alone=True)
    paths.log.mkdir(parents=True, exist_ok=True)
    paths.outage.unlink(missing_ok=True)


def run_to_the_end(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Run verl until all steps and the last validation are done; raises UsageError when that cannot be."""
    for attempt in range(settings.trainer.restarts + 1):
        if finished(settings, paths):
            return
        problem = run_verl(settings, paths, log)
        if problem is None and finished(settings, paths):
            return
        if problem is not None and problem.good_step is not None:
            raise UsageError(give_up(problem.text, problem.good_step, settings, paths))
        outage = read_outage(paths.outage)
        if outage is not None:
            raise UsageError(f"training stopped: {outage}. {how_to_resume(paths)}")
        if requested(paths.run) == "stop":
            raise Stopped(f"training stopped on request. {how_to_resume(paths)}")
        text = problem.text if problem else "verl ended before all steps and validations were done"
        log.warning("training crashed", problem=text, attempt=attempt + 1, log=str(paths.log / "verl.log"))
    raise UsageError(f"training stopped: {text}; see {paths.log / 'verl.log'}. {how_to_resume(paths)}")


def finished(settings: Settings, paths: RunPaths) -> bool:
    """Whether the last step has a checkpoint and the last validation enough judged rows."""
    newest = newest_checkpoint(paths.checkpoints)
    done = read_verdicts(paths.log, HELD_OUT).get(settings.trainer.steps, [])
    return newest is not None and newest[0] >= settings.trainer.steps and validated(done, settings.trainer)


def validated(rows: list[Verdict], trainer: TrainerSettings) -> bool:
    """Whether a validation has all its rows and services lost no more of them than of a training batch."""
    lost = len(rows) - len(valid_only(rows))
    return len(rows) >= trainer.eval_seeds and lost <= trainer.max_invalid_share * trainer.eval_seeds


def give_up(problem: str, good_step: int, settings: Settings, paths: RunPaths) -> str:
    """Go back to the last checkpoint of at most step `good_step` after a fatal alarm; returns the words for it."""
    good = go_back(paths.checkpoints, paths.good, through=good_step)
    if good is None:
        return f"training stopped: {problem}. There is no checkpoint from before that: the same command starts afresh"
    publish_last_good(settings, paths, good)
    return (
        f"training stopped: {problem}. The last good checkpoint is that of step {good[0]}; its weights are in "
        f"{paths.last_good}. The same command tries again from there; to change settings and keep what was learnt, set "
        f"DRZERO_TRAINER__ACTOR__MODEL={paths.last_good.resolve()}"
    )


def how_to_resume(paths: RunPaths) -> str:
    """The last words of an interrupted training."""
    newest = newest_checkpoint(paths.checkpoints)
    place = f"the checkpoint of step {newest[0]}" if newest else "the start (no checkpoint yet)"
    return f"Run the same command again to resume from {place}"


def run_verl(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> Problem | None:
    """One attempt; returns None when verl ended well, else what happened."""
    discard_incomplete(paths.checkpoints)
    newest = newest_checkpoint(paths.checkpoints)
    keep = partial(validated, trainer=settings.trainer)
    compact(paths.log, through=newest[0] if newest else -1, validation_stands=keep)
    paths.waiting.unlink(missing_ok=True)
    write_verl_files(paths)
    model = resolve_model(settings.trainer.actor.model, settings)
    overrides = verl_overrides(settings, paths, model=model, resume_from=str(newest[1]) if newest else None)
    if newest and newest[0] >= settings.trainer.steps:
        overrides += ["trainer.val_only=true", "trainer.val_before_train=true"]
    log.info("verl starts", steps=settings.trainer.steps, resumed_at=newest[0] if newest else 0)
    variables = verl_variables(paths)
    if settings.trainer.ray_address is not None:
        overrides += cluster_overrides(cluster_variables(settings) | variables)
    with child(overrides, as_environment(settings) | variables, paths) as process:
        return follow(process, settings, paths, log)


def write_verl_files(paths: RunPaths) -> None:
    """The two files that verl reads beside its overrides. JSON is YAML."""
    tool = {"class_name": "services.trainer.search_tool.SearchTool", "config": {"type": "native"}}
    write_atomically(paths.tools_file, json.dumps({"tools": [tool | {"tool_schema": SEARCH_TOOL}]}))
    agent = {"name": AGENT, "_target_": "services.trainer.agent_loop.SearchAgentLoop"}
    write_atomically(paths.agents_file, json.dumps([agent]))


def verl_variables(paths: RunPaths) -> dict[str, str]:
    """What every process of verl finds in its environment besides what is there."""
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VERL_USE_EXTERNAL_MODULES": "services.trainer.plugin",
        "VERL_FILE_LOGGER_PATH": str(paths.log / f"metrics-{time.time_ns()}.jsonl"),
        "HYDRA_FULL_ERROR": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        # One heap per thread lets glibc keep gigabytes that were freed long ago.
        "MALLOC_ARENA_MAX": "2",
        # Ray's memory monitor counts the page cache of a checkpoint as used memory and kills workers for it; the
        # kernel knows better.
        "RAY_memory_monitor_refresh_ms": "0",
    }


def cluster_variables(settings: Settings) -> dict[str, str]:
    """Our settings for processes of a Ray cluster, but not the one that may hold a password: verl logs them."""
    own = {name: value for name, value in as_environment(settings).items() if value}
    own.pop("DRZERO_REDIS__URL", None)
    return own | {
        "DRZERO_STORAGE__DATA_DIR": str(settings.storage.data_dir.absolute()),
        "DRZERO_STORAGE__SCRATCH_DIR": str(settings.storage.scratch_dir.absolute()),
    }


@contextmanager
def child(overrides: list[str], variables: Mapping[str, str], paths: RunPaths) -> Iterator[subprocess.Popen[bytes]]:
    """verl in a process group of its own; the group is ended when the block ends."""
    environment = os.environ | variables | {PARENT: str(os.getpid())}
    command = [sys.executable, "-m", "services.trainer.verl_main", *overrides]
    with (paths.log / "verl.log").open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL, to verl and all it has started."""
    for number, patience in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, TERM_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def follow(
    process: subprocess.Popen[bytes], settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger
) -> Problem | None:
    """Watch one attempt until verl ends or must be stopped. Returns what went wrong, or None."""
    watch = Watch(settings, paths, log)
    while True:
        code = process.poll()
        problem = watch.look()
        if code == 0 and (problem is None or problem.good_step is None):
            return None
        if problem is not None:
            return problem
        if code is not None:
            return Problem(f"verl ended with status {code}")
        time.sleep(POLL_S)


def publish_record(settings: Settings, paths: RunPaths, shape: dict[str, Any], origin: dict[str, str]) -> None:
    """Publish the rollouts, the held-out verdicts and the metrics of a finished training."""
    steps = settings.trainer.steps
    with publish(paths.training, settings=shape, made_from=origin) as draft:
        train_rows = [v for rows in read_verdicts(paths.log, TRAIN).values() for v in rows]
        held_rows = [v for rows in read_verdicts(paths.log, HELD_OUT).values() for v in rows]
        metrics = [{"step": step, **values} for step, values in read_metrics(paths.log).items() if step <= steps]
        for name, rows in (("rollouts", train_rows), ("held_out", held_rows), ("metrics", metrics)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (draft.path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        draft.rows = len(train_rows)
        draft.seconds = seconds_trained(paths.log)
        draft.counts = {
            "steps": steps,
            "rollouts": len(train_rows),
            "invalid": len(train_rows) - len(valid_only(train_rows)),
            "refused_batches": len(read_refusals(paths.log)),
            "held_out": len(held_rows),
        }

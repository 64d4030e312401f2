"""Stages `publish` and `solver_publish`: the newest checkpoint → `weights/`, plain Hugging Face files.

verl has written the weights in bf16 beside its shards; they are copied as an artifact with hashes, and how far they
are from the base model is measured, because a training that changed nothing must not look like one that did. A model
card (`model_card.py`) says what they are; it has no scores yet.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import structlog

from services.trainer.adapters import merge_adapters
from services.trainer.checkpoints import newest_checkpoint
from services.trainer.model_card import CARD, base_of, model_card
from services.trainer.paths import RunPaths, run_paths
from services.trainer.serving import serve
from shared.command import UsageError
from shared.files import MANIFEST, ArtifactError, Manifest, publish, read_manifest, stale_reason
from shared.model_files import resolve_model
from shared.settings import Settings, changed


def publish_weights(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Publish the trained weights unless the current ones are there."""
    origin = {"training": read_manifest(paths.training).identity}
    reason = stale_reason(paths.weights, settings={}, made_from=origin)
    if reason is None:
        log.info("weights reused", path=str(paths.weights))
        return
    newest = newest_checkpoint(paths.checkpoints)
    if newest is None or newest[0] != settings.trainer.steps:
        raise ArtifactError(
            f"expected the checkpoint of step {settings.trainer.steps} in {paths.checkpoints}, found "
            f"{newest[0] if newest else 'none'}; delete {paths.training} and run the stage train again"
        )
    base = resolve_model(settings.trainer.actor.model, settings)
    with publish(paths.weights, settings={}, made_from=origin) as draft:
        copy_weights(newest[1], draft.path)
        change = weight_change(Path(base), draft.path)
        (draft.path / "change.json").write_text(json.dumps(change, indent=2) + "\n", encoding="utf-8")
        behind = {name: read_manifest(folder) for name, folder in folders_behind(settings).items()}
        card = model_card(settings, behind, base_of(base_reference(behind["training"], settings.trainer.role)))
        (draft.path / CARD).write_text(card, encoding="utf-8")
        draft.rows = 1
    log.info("weights published", path=str(paths.weights), **change)


def base_reference(training: Manifest, role: str) -> str:
    """What a role of the run began with, as its training's manifest names it: a solver's run keeps it."""
    return str(training.settings["solver" if role == "solver" else "actor"]["model"])


def folders_behind(settings: Settings) -> dict[str, Path]:
    """What the weights of the settings' role and round are made from, from the training to the corpus.

    It ends before the first artifact that is not, or no longer, what the one before was made from.
    """
    paths = run_paths(settings)
    chain = [("seeds", paths.seeds)]
    if settings.trainer.role == "solver":
        papers = run_paths(changed(settings, {"trainer.role": "proposer"})).seeds
        chain += [("questions", paths.questions), ("papers", papers)]
    found, last = {"training": paths.training}, read_manifest(paths.training)
    for name, folder in [*chain, ("corpus", paths.corpus)]:
        if not (folder / MANIFEST).is_file():
            break
        manifest = read_manifest(folder)
        if last.made_from.get(folder.name) != manifest.identity:
            break
        found[name], last = folder, manifest
    return found


def published_round(settings: Settings, role: str, wanted: int | None) -> int:
    """The newest round of the run with weights of a role, or the wanted one; UsageError when there are none."""
    folder = run_paths(settings).run
    found = sorted(int(file.parts[-4]) for file in folder.glob(f"[0-9]*/{role}/weights/{MANIFEST}"))
    if wanted is None and found:
        return found[-1]
    if wanted not in found:
        asked = "any round" if wanted is None else f"round {wanted}"
        raise UsageError(
            f"expected weights of the {role} of {asked} in {folder}, found those of {found or 'none'}; name another "
            "round or run (DRZERO_TRAINER__RUN), or train with python -m services.trainer"
        )
    return wanted


def publish_solver(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Publish the solver's weights, and have :8001 serve them in place."""
    publish_weights(settings, paths, log)
    serve(settings, str(paths.weights), log)


def publish_last_good(paths: RunPaths, checkpoint: tuple[int, Path]) -> None:
    """Publish the weights of the last good checkpoint of a training that a guard has stopped, as `last_good/`."""
    step, folder = checkpoint
    origin = {"seeds": read_manifest(paths.seeds).identity}
    with publish(paths.last_good, settings={"step": step}, made_from=origin) as draft:
        copy_weights(folder, draft.path)
        draft.rows = 1


def copy_weights(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint's Hugging Face files into `folder`, adapters merged."""
    for file in sorted((checkpoint / "actor" / "huggingface").iterdir()):
        shutil.copyfile(file, folder / file.name)
    merge_adapters(checkpoint / "actor", folder)


def weight_change(base: Path, trained: Path) -> dict[str, float | int]:
    """How the trained weights differ from the base, both as bf16: share of tensors and of values, relative L2 norm."""
    import torch

    old, new = load_tensors(base), load_tensors(trained)
    tensors = values = changed_tensors = changed_values = 0
    distance = norm = 0.0
    for name in sorted(set(old) & set(new)):
        before, after = old[name].to(torch.bfloat16), new[name].to(torch.bfloat16)
        different = int((before != after).sum())
        tensors += 1
        values += before.numel()
        changed_tensors += different > 0
        changed_values += different
        distance += float((after.float() - before.float()).square().sum())
        norm += float(before.float().square().sum())
    return {
        "tensors": tensors,
        "changed_tensors": changed_tensors,
        "changed_share": changed_values / max(values, 1),
        "relative_change": (distance / norm) ** 0.5 if norm else 0.0,
    }


def load_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a folder's safetensors files; empty for a Hugging Face id that is no folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}

"""Stages `publish` and `solver_publish`: the newest checkpoint → `weights/`, plain Hugging Face files.

verl writes the weights beside its shards in the precision that it trains in. They are copied as an artifact with
hashes, rounded once to `trainer.actor.rollout_dtype`: to the very policy that was rewarded and will be served. How far
they are from the base model is measured, because a training that changed nothing must not look like one that did. A
model card (`model_card.py`) says what they are; it has no scores yet. Then the training's checkpoints are dropped.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from services.trainer.adapters import merged_checkpoint
from services.trainer.checkpoints import discard_all, newest_checkpoint
from services.trainer.disk_parts import is_published
from services.trainer.model_card import CARD, base_of, model_card
from services.trainer.paths import RunPaths, run_paths
from services.trainer.rounds import paths_of
from services.trainer.serving import serve
from shared.command import UsageError
from shared.files import MANIFEST, ArtifactError, Manifest, publish, read_manifest, stale_reason
from shared.model_files import resolve_model
from shared.settings import Settings, changed

TENSORS = ".safetensors"
INDEX = "model.safetensors.index.json"  # which tensor is in which file, where there are several


def publish_weights(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Publish the trained weights unless the current ones are there, and drop the checkpoints that they came from."""
    origin = {"training": read_manifest(paths.training).identity}
    if stale_reason(paths.weights, settings={}, made_from=origin) is None:
        log.info("weights reused", path=str(paths.weights))
    else:
        publish_checkpoint(settings, paths, origin, log)
    if is_published(paths):  # and not the training of changed settings that has begun there
        discard_all(paths.checkpoints)


def publish_checkpoint(
    settings: Settings, paths: RunPaths, origin: Mapping[str, str], log: structlog.stdlib.BoundLogger
) -> None:
    """Publish the weights of the last step's checkpoint; raises ArtifactError when it is not there."""
    newest = newest_checkpoint(paths.checkpoints)
    if newest is None or newest[0] != settings.trainer.steps:
        stage = "solver_train" if settings.trainer.role == "solver" else "train"
        raise ArtifactError(
            f"expected the checkpoint of step {settings.trainer.steps} in {paths.checkpoints}, found "
            f"{newest[0] if newest else 'none'} (checkpoints go when their weights are published); delete "
            f"{paths.training} and run again from {settings.trainer.round}.{stage}, which trains from the first step"
        )
    base = resolve_model(settings.trainer.actor.model, settings)
    with publish(paths.weights, settings={}, made_from=origin) as draft:
        copy_weights(newest[1], draft.path, dtype=settings.trainer.actor.rollout_dtype)
        change = weight_change(Path(base), draft.path)
        write_json(draft.path / "change.json", change)
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
    """Publish the solver's weights, and have :8001 serve them in place unless a later round has its own."""
    publish_weights(settings, paths, log)
    later = paths_of(settings, settings.trainer.round + 1, "solver").weights
    if (later / MANIFEST).is_file():  # these may have been freed meanwhile (disk_parts.py)
        log.info("weights of a later round are there to be served", path=str(later))
    else:
        serve(settings, str(paths.weights), log)


def publish_last_good(settings: Settings, paths: RunPaths, checkpoint: tuple[int, Path]) -> None:
    """Publish the weights of the last good checkpoint of a training that a guard has stopped, as `last_good/`."""
    step, folder = checkpoint
    origin = {"seeds": read_manifest(paths.seeds).identity}
    with publish(paths.last_good, settings={"step": step}, made_from=origin) as draft:
        copy_weights(folder, draft.path, dtype=settings.trainer.actor.rollout_dtype)
        draft.rows = 1


def copy_weights(checkpoint: Path, folder: Path, *, dtype: str) -> None:
    """Copy a checkpoint's Hugging Face files into `folder`: adapters merged, then all numbers rounded to `dtype`.

    With `auto` they stay as they are. One file of weights at a time is in memory, or all where there are adapters.
    """
    actor = checkpoint / "actor"
    plain = merged_checkpoint(actor)
    size = 0
    for file in sorted((actor / "huggingface").iterdir()):
        if file.suffix != TENSORS or (plain is None and dtype == "auto"):
            shutil.copyfile(file, folder / file.name)
        elif plain is None:
            size += save_rounded(tensors_of(file), folder / file.name, dtype)
    if plain is not None:
        (folder / INDEX).unlink(missing_ok=True)
        save_rounded(plain.items(), folder / f"model{TENSORS}", dtype)
    if dtype != "auto":
        tell_dtype(folder, dtype, size)


def save_rounded(tensors: Iterable[tuple[str, Any]], file: Path, dtype: str) -> int:
    """Write tensors with their floating-point numbers in `dtype`, or as they are (`auto`); returns their bytes."""
    import torch
    from safetensors.torch import save_file

    wanted = None if dtype == "auto" else getattr(torch, dtype)
    rounded = {name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in tensors}
    file.touch()
    mode = file.stat().st_mode  # save_file makes files that only their owner may read, and a solver may be another
    save_file(rounded, file, metadata={"format": "pt"})
    file.chmod(mode)
    return sum(tensor.nbytes for tensor in rounded.values())


def tell_dtype(folder: Path, dtype: str, size: int) -> None:
    """Make config.json and the index of several files of weights say what these hold: `size` bytes in `dtype`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
    write_json(folder / "config.json", config | dict.fromkeys(names, dtype))
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = size
        write_json(folder / INDEX, index)


def write_json(file: Path, value: Any) -> None:
    """A JSON file as transformers writes it."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
    return {name: tensor for file in sorted(folder.glob(f"*{TENSORS}")) for name, tensor in tensors_of(file)}


def tensors_of(file: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a file, one after the other."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # it is no mapping
            yield name, opened.get_tensor(name)

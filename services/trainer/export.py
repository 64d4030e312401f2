"""A round's solver to take away: `python -m services.trainer.export [--round N] [--to FILE.zip] [--push OWNER/NAME]`.

The zip has one folder: the weights with a model card, loadable as it is, and beside them evaluation.json, report.html,
questions.parquet and the manifests of all that they were made from. What is missing or belongs to other weights is left
out with a warning. The same artifacts give the same bytes: nothing is compressed, and no time enters; of a base that is
a page of the Hugging Face hub, the licence is asked there. `--push` uploads the weights and the card to the hub instead
(a new repository is private), with the token in HF_TOKEN.
"""

import argparse
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import structlog

from services.trainer.model_card import CARD, base_of, model_card
from services.trainer.paths import RunPaths, run_paths
from services.trainer.publish import base_reference, folders_behind, published_round
from services.trainer.questions import FILE
from services.trainer.rounds import paths_of
from shared.command import UsageError, counted, run
from shared.files import MANIFEST, ArtifactError, hash_json, read_manifest, require_free_space
from shared.settings import Settings, changed

INSIDE = {"evaluation": "evaluation.json", "report": "report.html", "questions": FILE}  # what of an artifact goes along
MOST_ROUND = 10_000
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can hold
MODE = 0o100644 << 16  # a plain file, readable by all
UNIX = 3


def main(given: argparse.Namespace, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Write the zip, or push, or both when both are asked for."""
    token = hub_token() if given.push else ""
    number = published_round(settings, "solver", given.round)
    own = changed(settings, {"trainer.round": number, "trainer.role": "solver"})
    paths = run_paths(own)
    read_manifest(paths.weights, verify=True)
    beside = accompanying(own, paths, log)
    files, card = files_of(paths, beside), card_of(own, beside).encode()
    if given.to or not given.push:
        name = f"{own.trainer.run}-{number}-solver"
        target = target_of(given.to, own, name)
        require_free_space(target.absolute(), size_gb(files.values()) + own.storage.min_free_gb)
        contents: dict[str, Path | bytes] = {**files, CARD: card}
        write_zip({f"{name}/{inside}": contents[inside] for inside in sorted(contents)}, target)
        log.info("exported", file=str(target), bytes=target.stat().st_size, files=len(contents))
        print(target)
    if given.push:
        weights = {name: files[name] for name in read_manifest(paths.weights).files}
        push({**weights, CARD: card}, given.push, token)
        log.info("pushed", repository=given.push)


def target_of(given: str | None, settings: Settings, name: str) -> Path:
    """The file to write; UsageError for a folder."""
    target = Path(given) if given else settings.storage.data_dir / "exports" / f"{name}.zip"
    if target.is_dir():
        raise UsageError(f"expected a file to write at {target}, found a folder; name a file: --to {target}/{name}.zip")
    return target


def size_gb(files: Iterable[Path]) -> float:
    """What files take, in GB."""
    return sum(file.stat().st_size for file in files) / 1e9


def files_of(paths: RunPaths, beside: Mapping[str, Path]) -> dict[str, Path]:
    """Every file of the export but the card, by its name inside."""
    weights = paths.weights.resolve()
    found = {name: weights / name for name in read_manifest(weights).files}
    found |= {INSIDE[name]: beside[name] / INSIDE[name] for name in INSIDE if name in beside}
    if "report" in beside:  # its pages link to each other
        found |= {name: beside["report"] / name for name in read_manifest(beside["report"]).files}
    artifacts = {"weights": weights, **beside}
    return found | {f"manifests/{name}.json": folder / MANIFEST for name, folder in artifacts.items()}


def card_of(settings: Settings, beside: Mapping[str, Path]) -> str:
    """The model card, with the scores of the evaluation where there is one."""
    file = beside["evaluation"] / INSIDE["evaluation"] if "evaluation" in beside else None
    evaluation = json.loads(file.read_text(encoding="utf-8")) if file else None
    manifests = {name: read_manifest(folder) for name, folder in beside.items()}
    base = base_of(base_reference(manifests["training"], settings.trainer.role), ask_hub=True)
    date = made_on(beside["corpus"]) if "corpus" in beside else ""
    return model_card(settings, manifests, base, evaluation=evaluation, corpus_date=date)


def accompanying(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> dict[str, Path]:
    """What the weights were made from, and evaluation and report where they are whole and belong to them."""
    if read_manifest(paths.weights).made_from.get("training") != read_manifest(paths.training).identity:
        raise ArtifactError(f"{paths.weights} are not of the training beside them; run the stage solver_publish again")
    found = {name: folder.resolve() for name, folder in folders_behind(settings).items()}
    for name in ("questions", "corpus"):
        if name not in found:
            log.warning("left out", artifact=name, because="it is not there, or not what the solver was trained on")
    wanted: dict[str, Callable[[], Path]] = {
        "evaluation": partial(evaluation_of, paths),
        "report": partial(report_of, settings, paths),
    }
    for name, folder in wanted.items():
        try:
            found[name] = folder().resolve()
        except ArtifactError as error:
            log.warning("left out", artifact=name, because=str(error))
    for name in INSIDE.keys() & found.keys():
        read_manifest(found[name], verify=True)
    return found


def evaluation_of(paths: RunPaths) -> Path:
    """The evaluation of the weights; ArtifactError when there is none."""
    if read_manifest(paths.evaluation).made_from.get("solver") != read_manifest(paths.weights).identity:
        raise ArtifactError(f"{paths.evaluation} is of other weights; run the stages evaluate and report again")
    return paths.evaluation


def report_of(settings: Settings, paths: RunPaths) -> Path:
    """The report of that evaluation; ArtifactError when there is none."""
    evaluation_of(paths)
    if read_manifest(paths.report).made_from.get("evaluations") != evaluations(settings):
        raise ArtifactError(f"{paths.report} is of other evaluations; run the stage report again")
    return paths.report


def evaluations(settings: Settings) -> str:
    """What the report of the settings' round is made from; see report.py."""
    rounds = range(1, settings.trainer.round + 1)
    return hash_json([read_manifest(paths_of(settings, number, "solver").evaluation).identity for number in rounds])


def made_on(artifact: Path) -> str:
    """The day on which an artifact was published, from the name of its version; "" where it has none."""
    stamp = re.search(r"\.(\d{19})$", artifact.resolve().name)
    return datetime.fromtimestamp(int(stamp[1]) / 1e9, UTC).date().isoformat() if stamp else ""


def write_zip(contents: Mapping[str, Path | bytes], target: Path) -> None:
    """Write a zip that is there as a whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            with ZipFile(stream, "w", ZIP_STORED) as archive:
                for name, content in contents.items():
                    add(archive, name, content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def add(archive: ZipFile, name: str, content: Path | bytes) -> None:
    """Add a file, the same bytes on any day and machine."""
    entry = ZipInfo(name, EPOCH)
    entry.create_system, entry.external_attr = UNIX, MODE
    if isinstance(content, bytes):
        archive.writestr(entry, content)
        return
    entry.file_size = content.stat().st_size  # decides whether the entry has zip64's longer fields
    with content.open("rb") as source, archive.open(entry, "w") as goal:
        shutil.copyfileobj(source, goal, 1024**2)


# --- the hub


def hub_token() -> str:
    """The token in HF_TOKEN; UsageError without one, or for one that cannot be sent."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]+", token):
        found = "one with characters that no token has" if token else "none"
        raise UsageError(
            f"expected a Hugging Face token with write access in HF_TOKEN, found {found}; set it and push again"
        )
    return token


def push(files: Mapping[str, Path | bytes], repository: str, token: str) -> None:
    """Upload files in one commit; a repository that is not there yet is made private."""
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        added = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        api.create_commit(repository, added, commit_message="Weights and model card")
    # An upload that fails on the way is a RuntimeError of the library.
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        words = (str(error).splitlines() or [type(error).__name__])[0].replace(token, "***")
        raise UsageError(
            f"expected to push to {repository}, but the hub refuses or is out of reach ({words}); "
            "check HF_TOKEN, the name and the network, and push again"
        ) from None  # the cause may have the token in its words


def repository_of(text: str) -> str:
    """`owner/name`; ArgumentTypeError for any other text."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected owner/name, found {text!r}")
    return text


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m services.trainer.export", description="Export the solver of a round with all that tells of it."
    )
    parser.add_argument("--round", type=partial(counted, most=MOST_ROUND), help="the newest unless given")
    parser.add_argument("--to", metavar="FILE.zip", help="where to write; <data>/exports/<run>-<round>-solver.zip")
    parser.add_argument("--push", type=repository_of, metavar="OWNER/NAME", help="upload the weights to the hub")
    return parser.parse_args(words)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no half-written file stays
    raise SystemExit(run("trainer", partial(main, parsed())))

"""A round's solver to take away: `python -m services.trainer.export [--round N] [--to FILE.zip] [--push OWNER/NAME]`.

The zip has one folder: the weights with a model card, loadable as it is, and beside them evaluation.json, report.html,
questions.parquet and the manifests of all that they were made from. What is missing or belongs to other weights is left
out with a warning. The same artifacts give the same bytes: nothing is compressed, and no time enters. `--push` uploads
the weights and the card to the Hugging Face hub instead (a new repository is private), with the token in HF_TOKEN.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import structlog

from services.trainer.generate import counted
from services.trainer.model_card import CARD, base_of, model_card
from services.trainer.paths import RunPaths, run_paths
from services.trainer.publish import base_reference, manifests_behind, published_round
from services.trainer.questions import FILE
from services.trainer.rounds import paths_of
from shared.command import UsageError, run
from shared.files import MANIFEST, ArtifactError, hash_json, read_manifest, require_free_space
from shared.settings import Settings, changed

EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can hold
MODE = 0o100644 << 16  # a plain file, readable by all
UNIX = 3


def main(given: argparse.Namespace, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Write the zip, or push, or both when both are asked for."""
    number = published_round(settings, "solver", given.round)
    own = changed(settings, {"trainer.round": number, "trainer.role": "solver"})
    paths = run_paths(own)
    token = hub_token() if given.push else ""
    name = f"{own.trainer.run}-{number}-solver"
    target = Path(given.to) if given.to else own.storage.data_dir / "exports" / f"{name}.zip"
    if target.is_dir():
        raise UsageError(f"expected a file to write at {target}, found a folder; name a file: --to {target}/{name}.zip")
    read_manifest(paths.weights, verify=True)
    files = files_of(own, paths, log)
    card = card_of(own, paths, files.get("evaluation.json"))
    if given.to or not given.push:
        size = sum(file.stat().st_size for file in files.values())
        require_free_space(target.absolute(), size / 1e9 + own.storage.min_free_gb)
        contents: dict[str, Path | bytes] = {**files, CARD: card.encode()}
        write_zip({f"{name}/{inside}": contents[inside] for inside in sorted(contents)}, target)
        log.info("exported", file=str(target), bytes=target.stat().st_size, files=len(contents))
        print(target)
    if given.push:
        push(paths.weights.resolve(), card, given.push, token)
        log.info("pushed", repository=given.push)


def files_of(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> dict[str, Path]:
    """Every file of the export but the card, by its name inside."""
    beside = accompanying(settings, paths, log)
    names = {"evaluation": "evaluation.json", "report": "report.html", "questions": FILE}
    found = {name: paths.weights / name for name in read_manifest(paths.weights).files}
    found |= {names[artifact]: folder / names[artifact] for artifact, folder in beside.items()}
    if "report" in beside:
        found |= {name: beside["report"] / name for name in read_manifest(beside["report"]).files}
    behind = {"corpus": paths.corpus, "seeds": paths.seeds, "training": paths.training}
    named = {name: folder for name, folder in behind.items() if name in manifests_behind(settings)}
    for name, folder in {"weights": paths.weights, **beside, **named}.items():
        found[f"manifests/{name}.json"] = folder / MANIFEST
    return found


def card_of(settings: Settings, paths: RunPaths, evaluation: Path | None) -> str:
    """The model card, with the scores of an evaluation.json."""
    found = json.loads(evaluation.read_text(encoding="utf-8")) if evaluation else None
    base = base_of(base_reference(settings), settings, ask_hub=True)
    origins = manifests_behind(settings)
    date = made_on(paths.corpus) if "corpus" in origins else ""
    return model_card(settings, origins, base, evaluation=found, corpus_date=date)


def accompanying(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> dict[str, Path]:
    """Evaluation, report and questions of the round, where they are whole and belong to its weights."""
    wanted: dict[str, Callable[[], Path]] = {
        "evaluation": partial(evaluation_of, paths),
        "report": partial(report_of, settings, paths),
        "questions": partial(questions_of, paths),
    }
    found = {}
    for name, folder in wanted.items():
        try:
            found[name] = folder()
        except ArtifactError as error:
            log.warning("left out", artifact=name, because=str(error))
    return found


def evaluation_of(paths: RunPaths) -> Path:
    """The evaluation of the weights; ArtifactError when there is none."""
    if read_manifest(paths.evaluation, verify=True).made_from.get("solver") != read_manifest(paths.weights).identity:
        raise ArtifactError(f"{paths.evaluation} is of other weights; run the stages evaluate and report again")
    return paths.evaluation


def report_of(settings: Settings, paths: RunPaths) -> Path:
    """The report of that evaluation; ArtifactError when there is none."""
    evaluation_of(paths)
    if read_manifest(paths.report, verify=True).made_from.get("evaluations") != evaluations(settings):
        raise ArtifactError(f"{paths.report} is of other evaluations; run the stage report again")
    return paths.report


def questions_of(paths: RunPaths) -> Path:
    """The questions that the weights were trained on; ArtifactError when they are not there."""
    if read_manifest(paths.questions, verify=True).identity != read_manifest(paths.seeds).made_from.get("questions"):
        raise ArtifactError(f"{paths.questions} are not those that the solver was trained on; run the rounds again")
    return paths.questions


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
    """The token in HF_TOKEN; UsageError without one."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise UsageError(
            "expected a Hugging Face token with write access in HF_TOKEN, found none; set it and push again"
        )
    return token


def push(weights: Path, card: str, repository: str, token: str) -> None:
    """Upload a weights folder with its card; a repository that is not there yet is made private."""
    import httpx
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=weights, ignore_patterns=[CARD, MANIFEST])
        api.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo=CARD)
    except (httpx.HTTPError, ValueError) as error:
        raise UsageError(
            f"expected to push to {repository}, but the hub refuses or is out of reach ({str(error).splitlines()[0]}); "
            "check HF_TOKEN, the name and the network, and push again"
        ) from error


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
    parser.add_argument("--round", type=partial(counted, most=10_000), help="the newest unless given")
    parser.add_argument("--to", metavar="FILE.zip", help="where to write; <data>/exports/<run>-<round>-solver.zip")
    parser.add_argument("--push", type=repository_of, metavar="OWNER/NAME", help="upload the weights to the hub")
    return parser.parse_args(words)


if __name__ == "__main__":
    raise SystemExit(run("trainer", partial(main, parsed())))

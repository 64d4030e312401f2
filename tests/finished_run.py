"""A run whose solver has been trained and examined, as small artifacts with the origins that real ones have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corpora import publish_corpus
from round_world import question_of, settings_at

from services.trainer.evaluation_sets import Item
from services.trainer.exam import Graded, compare, marks
from services.trainer.questions import FILE
from services.trainer.records import TRAIN
from services.trainer.rounds import Role, paths_of
from services.trainer.seeds import write_rows
from shared.files import hash_json, publish, read_manifest
from shared.records import Paper
from shared.settings import Settings

PAPERS = [Paper(str(number), f"Zinc {number}", f"Zinc heals wounds of kind {number}.") for number in (7, 8, 9)]
BASE_CARD = "---\nlicense: apache-2.0\n---\n\n# The base\n"


def finished_run(folder: Path, rounds: int = 1, *, base: str | None = None) -> Settings:
    """A run in `folder` whose solver began with `base`, or with a folder whose card names a licence."""
    settings = settings_at(folder, storage__min_free_gb=0.0)
    (folder / "base" / "README.md").write_text(BASE_CARD, encoding="utf-8")
    publish_corpus(settings.storage.data_dir, PAPERS)
    for number in range(1, rounds + 1):
        publish_finished_round(settings, number, base or settings.solver.model)
    return settings


def publish_finished_round(settings: Settings, number: int, base: str) -> None:
    """All artifacts of a round that its export needs."""
    proposer, solver = paths_of(settings, number, "proposer"), paths_of(settings, number, "solver")
    make(proposer.seeds, {"train.txt": f"{number}"}, corpus=proposer.corpus)
    with publish(proposer.questions, settings={}, made_from={"seeds": identity(proposer.seeds)}) as draft:
        write_rows([question_of("1.0", "Which metal heals?", "zinc", held_out=False)], draft.path / FILE)
        draft.counts = {TRAIN: 1}
    make(solver.seeds, {"train.txt": f"{number}"}, questions=proposer.questions)
    shape = {"steps": 3, "solver": {"model": base}, "actor": {"model": base, "learning_rate": 1e-6}, "prompts": "a|b"}
    make(solver.training, {"metrics.jsonl": f"{number}"}, shape, seeds=solver.seeds)
    weights = {"config.json": "{}", "model.safetensors": f"weights {number}" * 1000, "README.md": "no scores yet"}
    make(solver.weights, weights, training=solver.training)
    examine(settings, number)


def examine(settings: Settings, number: int) -> None:
    """Evaluation and report of a round."""
    paths = paths_of(settings, number, "solver")
    make(paths.evaluation, {"evaluation.json": json.dumps(evaluation())}, solver=paths.weights)
    past = [identity(paths_of(settings, one, "solver").evaluation) for one in range(1, number + 1)]
    with publish(paths.report, settings={}, made_from={"evaluations": hash_json(past)}) as draft:
        (draft.path / "report.html").write_text(f"<h1>Report {number}</h1>", encoding="utf-8")


def evaluation() -> dict[str, Any]:
    """An evaluation of four questions, of which the base knows one and the round two."""

    def graded(right: int) -> list[Graded]:
        items = [Item("kept_out", str(key), "Which?", ("zinc",)) for key in range(4)]
        told = {"found": False, "overdue": False, "searches": 1, "row": {}}
        return [Graded(item, "zinc", key < right, **told) for key, item in enumerate(items)]

    before, after = graded(1), graded(2)
    return {"sets": {"kept_out": {"base": marks(before), "round": marks(after), "change": compare(before, after)}}}


def make(target: Path, files: Mapping[str, str], settings: Mapping[str, Any] | None = None, **origins: Path) -> None:
    """An artifact of these texts, made from those."""
    made_from = {name: identity(folder) for name, folder in origins.items()}
    with publish(target, settings=settings or {}, made_from=made_from) as draft:
        for name, text in files.items():
            (draft.path / name).write_text(text, encoding="utf-8")
        draft.rows = len(files)


def identity(artifact: Path) -> str:
    """What other manifests call it."""
    return read_manifest(artifact).identity


def weights_at(settings: Settings, number: int = 1, role: Role = "solver") -> Path:
    """The weights of a round."""
    return paths_of(settings, number, role).weights

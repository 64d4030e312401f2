"""The model card: what it says follows from the artifacts alone, and its front matter is what the hub reads."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import structlog
from finished_run import BASE_CARD, evaluation, finished_run, weights_at
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_model import save_tiny_model

from services.trainer.model_card import CARD, UNKNOWN, Base, base_of, front_matter_in, model_card
from services.trainer.publish import base_reference, folders_behind, publish_weights, published_round
from services.trainer.rounds import Role, paths_of
from shared.command import UsageError
from shared.files import Manifest, publish, read_manifest
from shared.settings import Settings, changed

LOG: Any = structlog.wrap_logger(structlog.ReturnLogger())
SOLVER = changed(Settings(), {"trainer.role": "solver"})
PROPOSER = Settings()
WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1)
BASE = Base("acme/base", on_hub=True, licence={"license": "apache-2.0"})


def manifest(name: str, *, settings: dict[str, Any] | None = None, rows: int = 3, **origins: str) -> Manifest:
    return Manifest(name, rows, {}, settings or {}, origins, counts={"train": 12_345})


MANIFESTS = {
    "corpus": manifest("corpus", settings={"source": "entrez"}, rows=28_936, query="gout[mesh]", dates="2023.."),
    "questions": manifest("questions"),
    "training": manifest("training", settings={"steps": 7, "actor": {"learning_rate": 1e-6}, "prompts": "a|b"}),
}


# --- the text


def test_the_card_says_what_the_weights_are_what_they_were_made_from_and_how_good_they_are() -> None:
    card = model_card(SOLVER, MANIFESTS, BASE, evaluation=evaluation(), corpus_date="2026-11-23")
    for line in (
        "# demo: solver of round 1",
        "- Base model: acme/base",
        "- Licence: apache-2.0",
        f"- Corpus: 28,936 PubMed records from a query, made on 2026-11-23 (`{MANIFESTS['corpus'].identity[:12]}`)",
        "- Corpus query: `gout[mesh]`",
        f"- Questions: 12,345 train (`{MANIFESTS['questions'].identity[:12]}`)",
        "| optimizer steps | 7 |",
        "| learning rate | 1e-06 |",
        "| set of prompts | a\\|b |",
        "| kept_out (4) | 0.250 [0.046, 0.699] | 0.500 [0.150, 0.850] | – | +0.250 (p = 1.000) |",
    ):
        assert line in card.splitlines()
    assert "No medical advice" in card


def test_the_same_artifacts_give_the_same_card_whatever_the_settings_of_today() -> None:
    today = changed(SOLVER, {"trainer.steps": 999, "trainer.actor.learning_rate": 0.5, "solver.model": "acme/other"})
    assert model_card(today, MANIFESTS, BASE) == model_card(SOLVER, MANIFESTS, BASE)


def test_what_is_not_known_is_said_to_be_so() -> None:
    card = model_card(SOLVER, {}, Base("base", on_hub=False))
    assert card.count("Not recorded.") == 2
    assert "Not evaluated." in card
    assert f"- Licence: {UNKNOWN}" in card
    assert "The proposer is not examined by itself." in model_card(PROPOSER, {}, BASE)


def test_demo_records_are_not_called_pubmeds() -> None:
    card = model_card(SOLVER, {"corpus": manifest("corpus", settings={"source": "demo"})}, BASE)
    assert "3 demo records of textbook biomedicine, which are not PubMed's" in card
    assert "3 PubMed records" not in card


def test_every_score_has_its_interval_and_a_set_with_choices_its_f1() -> None:
    found = evaluation()
    found["sets"]["pubmedqa"] = json.loads(json.dumps(found["sets"]["kept_out"]))
    found["sets"]["pubmedqa"]["round"]["macro_f1"] = 0.4567
    rows = [line for line in model_card(SOLVER, {}, BASE, evaluation=found).splitlines() if "p = " in line]
    assert [row.split(" | ")[0] for row in rows] == ["| kept_out (4)", "| pubmedqa (4)"]
    assert [row.split(" | ")[3] for row in rows] == ["–", "0.457"]
    assert all(row.count("[") == 2 for row in rows)


# --- the front matter


@hypothesis_settings(deadline=None)  # the first one imports what writes YAML
@given(name=WORDS, licence=WORDS)
def test_the_front_matter_is_read_as_it_was_meant(name: str, licence: str) -> None:
    card = model_card(SOLVER, {}, Base(name, on_hub=True, licence={"license": licence}))
    found = front_matter_in(card)
    assert (found["base_model"], found["license"], found["language"]) == (name, licence, "en")
    assert card.partition("\n---\n\n")[2].startswith("# demo")


def test_a_base_that_is_no_page_of_the_hub_is_not_named_there() -> None:
    found = front_matter_in(model_card(SOLVER, {}, Base("folder", on_hub=False)))
    assert "base_model" not in found
    assert found["license"] == "unknown"


@hypothesis_settings(deadline=None)
@given(st.text())
def test_no_text_is_too_odd_to_look_for_front_matter_in(text: str) -> None:
    for card in (text, f"---\n{text}\n---\n", f"---\n{text}"):
        assert isinstance(front_matter_in(card), dict)


# --- the base


def test_the_licence_of_a_folder_is_that_of_its_card(tmp_path: Path) -> None:
    assert base_of(str(tmp_path)) == Base(tmp_path.name, on_hub=False)
    (tmp_path / CARD).write_text(BASE_CARD, encoding="utf-8")
    assert base_of(str(tmp_path)) == Base(tmp_path.name, on_hub=False, licence={"license": "apache-2.0"})
    (tmp_path / CARD).write_text("---\nlicense: unknown\n---\n", encoding="utf-8")
    assert base_of(str(tmp_path)).licence == {}


def test_weights_of_an_earlier_round_have_the_base_of_those(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    for base in (BASE, Base("folder", on_hub=False)):
        with publish(target, settings={}, made_from={"base": base.name}) as draft:
            (draft.path / CARD).write_text(model_card(PROPOSER, {}, base), encoding="utf-8")
        found = base_of(str(target))
        assert (found.on_hub, dict(found.licence)) == (base.on_hub, dict(base.licence))
        assert found.name == (base.name if base.on_hub else "the model that the run began with")


def test_a_page_of_the_hub_is_only_asked_where_that_is_wanted() -> None:
    assert base_of("acme/base") == Base("acme/base", on_hub=True)


def test_the_base_is_that_of_the_training_and_not_of_the_settings() -> None:
    training = manifest("training", settings={"solver": {"model": "acme/solver"}, "actor": {"model": "acme/actor"}})
    assert [base_reference(training, role) for role in ("solver", "proposer")] == ["acme/solver", "acme/actor"]


# --- in a run


def test_what_is_behind_weights_is_told_as_far_as_each_is_what_the_next_was_made_from(tmp_path: Path) -> None:
    settings = finished_run(tmp_path)
    own = changed(settings, {"trainer.role": "solver"})
    assert list(folders_behind(own)) == ["training", "seeds", "questions", "papers", "corpus"]
    with publish(paths_of(settings, 1, "proposer").seeds, settings={}, made_from={"test": "anew"}):
        pass
    assert list(folders_behind(own)) == ["training", "seeds", "questions"]


@pytest.mark.parametrize("role", ["proposer", "solver"])
def test_published_weights_have_a_card_without_scores(tmp_path: Path, role: Role) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    settings = changed(finished_run(tmp_path, base=model), {"trainer.role": role, "trainer.actor.model": model})
    paths = paths_of(settings, 1, role)
    (paths.kept / "weights").unlink(missing_ok=True)
    if role == "proposer":
        shape = {"steps": 3, "actor": {"model": model}}
        origin = {"seeds": read_manifest(paths.seeds).identity}
        with publish(paths.training, settings=shape, made_from=origin):
            pass
    actor = paths.checkpoints / f"global_step_{settings.trainer.steps}" / "actor"
    save_tiny_model(actor / "huggingface", seed=1)
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"state")
    zipfile.ZipFile(actor.parent / "data.pt", "w").close()
    publish_weights(settings, paths, LOG)
    card = (weights_at(settings, role=role) / CARD).read_text(encoding="utf-8")
    assert f"# demo: {role} of round 1" in card
    assert "- Base model: tiny" in card
    assert "- Corpus: 3 records" in card
    assert CARD in read_manifest(paths.weights).files


def test_the_newest_round_with_weights_is_found_by_number(tmp_path: Path) -> None:
    settings = finished_run(tmp_path)
    for number in (2, 10, 9):
        with publish(paths_of(settings, number, "solver").weights, settings={}, made_from={}):
            pass
    assert published_round(settings, "solver", None) == 10
    assert published_round(settings, "solver", 9) == 9
    with pytest.raises(UsageError, match="expected weights of the proposer of any round"):
        published_round(settings, "proposer", None)

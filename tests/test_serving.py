"""Which weights are served: damaged ones never, and after a restart the same."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from model_services import watched
from round_world import AnswersGets, publish_weights_at, save_words, settings_at, world_of

from services.trainer.paths import run_paths
from services.trainer.rounds import paths_of, proposer_settings
from services.trainer.serving import load_at, serve
from shared.clients import BadReply, Refused, Unavailable
from shared.files import ArtifactError
from shared.serving import checked_weights, note_path, note_served, weights_to_serve
from shared.settings import changed

LOG = structlog.get_logger()
NOBODY = "http://127.0.0.1:9"


def silent(_: dict[str, Any]) -> str:
    return ""


def damage(weights: str, how: str) -> None:
    """Spoil a file of a weights folder."""
    file = Path(weights) / "tokenizer.json"
    if how == "gone":
        file.unlink()
    else:
        text = file.read_text(encoding="utf-8")
        file.write_text(text[:-1] if how == "truncated" else text.replace("?", "!"), encoding="utf-8")


def test_weights_are_loaded_once_and_noted(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    with world_of(silent) as world:
        settings = settings_at(tmp_path, world.url)
        serve(settings, str(tmp_path / "weights"), LOG)
        serve(settings, str(tmp_path / "weights"), LOG)
    assert world.loaded == [weights]
    assert weights_to_serve(settings) == weights


@pytest.mark.parametrize("how", ["swapped", "truncated", "gone"])
def test_damaged_weights_are_refused_before_anything_is_asked(tmp_path: Path, how: str) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    damage(weights, how)
    with world_of(silent) as world:
        settings = settings_at(tmp_path, world.url)
        with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
            serve(settings, weights, LOG)
    assert (world.loaded, world.chats) == ([], [])
    assert not note_path(settings).exists()


def test_damaged_weights_are_refused_even_where_no_solver_can_be_asked(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    damage(weights, "swapped")
    with pytest.raises(ArtifactError, match="does not have the content its manifest names"):
        serve(settings_at(tmp_path, NOBODY, trainer__start_patience_s=0.2), weights, LOG)


def test_what_is_to_be_served_is_noted_although_the_solver_is_away(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    settings = settings_at(tmp_path, NOBODY, trainer__start_patience_s=0.2)
    with pytest.raises(Unavailable):
        serve(settings, weights, LOG)
    assert weights_to_serve(settings) == weights


def test_weights_that_are_published_again_under_the_same_name_are_loaded_again(tmp_path: Path) -> None:
    with world_of(silent) as world:
        settings = settings_at(tmp_path, world.url)
        loaded = []
        for name in ("one", "two"):
            loaded.append(publish_weights_at(tmp_path / "weights", name))
            serve(settings, str(tmp_path / "weights"), LOG)
    assert world.loaded == loaded
    assert loaded[0] != loaded[1]


def test_a_solver_that_was_started_by_a_link_to_the_weights_serves_them(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    with world_of(silent, model=str(tmp_path / "weights")) as world:
        assert not asyncio.run(load_at(world.url, weights, patience_s=5.0))


def test_the_second_of_two_solvers_fails_and_is_the_one_that_is_named(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    with world_of(silent) as good, world_of(silent, model="/models/other") as bad:
        bad.stubborn = True
        settings = changed(settings_at(tmp_path), {"solver.url": f"{good.url}, {bad.url}"})
        with pytest.raises(BadReply, match=f"expected {bad.url} to serve {weights}, found /models/other"):
            serve(settings, weights, LOG)
    assert good.loaded == [weights]


@pytest.mark.parametrize("reply", [{}, {"model_path": 7}, {"model_path": None}, []])
def test_a_solver_that_does_not_say_what_it_serves_is_told(reply: Any) -> None:
    with (
        watched(lambda _, __: (200, reply), handler=AnswersGets) as service,
        pytest.raises(BadReply, match="expected model_path in /get_model_info"),
    ):
        asyncio.run(load_at(service.url, "/weights", patience_s=5.0))


def test_every_address_serves_the_weights(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    with world_of(silent) as one, world_of(silent, model=weights) as other:
        settings = changed(settings_at(tmp_path), {"solver.url": f"{one.url},{other.url}"})
        serve(settings, weights, LOG)
    assert (one.loaded, other.loaded) == ([weights], [])


def test_a_solver_that_goes_on_with_other_weights_is_told(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    with world_of(silent, model="/models/other") as world:
        world.stubborn = True
        with pytest.raises(BadReply, match=r"to serve .* found /models/other"):
            asyncio.run(load_at(world.url, weights, patience_s=5.0))


def test_a_solver_that_refuses_is_named_with_what_it_needs(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    with world_of(silent, model="/models/other") as world:
        world.refusal = "tensors that do not fit"
        with pytest.raises(Refused, match=r"tensors that do not fit.*DRZERO_SOLVER__MODEL"):
            asyncio.run(load_at(world.url, weights, patience_s=5.0))


# ---- the note --------------------------------------------------------------------------------------------------------


def test_without_a_note_the_model_of_the_setting_is_served(tmp_path: Path) -> None:
    settings = settings_at(tmp_path)
    assert weights_to_serve(settings) == settings.solver.model


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_solver_that_starts_again_in_any_round_comes_back_with_what_the_driver_has_named(
    tmp_path: Path, number: int
) -> None:
    with world_of(silent) as world:
        settings = settings_at(tmp_path, world.url)
        for before in range(1, number):
            publish_weights_at(paths_of(settings, before, "solver").weights, f"solver {before}")
        own = proposer_settings(settings, number)
        proposer = publish_weights_at(run_paths(own).weights, f"proposer {number}")
        served = []
        for model in (own.solver.model, str(run_paths(own).weights), own.solver.model):  # training, questions, checks
            serve(own, model, LOG)
            served.append(weights_to_serve(settings))
    solver = str(Path(own.solver.model).resolve())
    assert served == [solver, proposer, solver]
    assert world.model == solver


def test_the_base_is_served_again_for_the_evaluation(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    with world_of(silent) as world:
        settings = settings_at(tmp_path, world.url)
        serve(settings, weights, LOG)
        serve(settings, settings.solver.model, LOG)
    assert world.loaded == [weights, settings.solver.model]
    assert weights_to_serve(settings) == settings.solver.model


def test_the_note_ends_with_another_model_in_the_settings(tmp_path: Path) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    with world_of(silent) as world:
        settings = settings_at(tmp_path, world.url)
        serve(settings, weights, LOG)
    assert weights_to_serve(settings) == weights
    assert weights_to_serve(changed(settings, {"solver.model": "somebody/else"})) == "somebody/else"


def test_a_note_for_another_model_is_left_alone(tmp_path: Path) -> None:
    settings = settings_at(tmp_path)
    settings.storage.data_dir.mkdir(parents=True)
    note = {"instead_of": "somebody/else", "weights": "/nothing"}
    note_path(settings).write_text(json.dumps(note), encoding="utf-8")
    assert weights_to_serve(settings) == settings.solver.model


@pytest.mark.parametrize("how", ["swapped", "truncated", "gone"])
def test_noted_weights_that_are_damaged_are_not_served(tmp_path: Path, how: str) -> None:
    weights = publish_weights_at(tmp_path / "weights", "one")
    with world_of(silent) as world:
        settings = settings_at(tmp_path, world.url)
        serve(settings, weights, LOG)
    damage(weights, how)
    with pytest.raises(ArtifactError, match=rf"delete {note_path(settings)}"):
        weights_to_serve(settings)


def test_a_noted_folder_that_is_gone_is_not_served_and_without_the_note_the_model_of_the_setting_is(
    tmp_path: Path,
) -> None:
    settings = settings_at(tmp_path)
    note_served(settings, str(tmp_path / "gone"))
    with pytest.raises(ArtifactError, match=rf"{tmp_path}/gone, found none.*delete {note_path(settings)}"):
        weights_to_serve(settings)
    note_path(settings).unlink()
    assert weights_to_serve(settings) == settings.solver.model


def test_a_folder_of_somebody_elses_has_no_hashes_and_passes(tmp_path: Path) -> None:
    folder = save_words(tmp_path / "theirs")
    (tmp_path / "link").symlink_to(folder)
    assert checked_weights(str(tmp_path / "link")) == folder


def test_a_hugging_face_id_passes_and_a_missing_folder_does_not() -> None:
    assert checked_weights("Qwen/Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"
    with pytest.raises(ArtifactError, match="run the stage that publishes them"):
        checked_weights("/nowhere/weights")

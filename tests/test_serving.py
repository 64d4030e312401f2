"""Which weights are served: damaged ones never, and after a restart the same."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from round_world import publish_weights_at, settings_at, world_of

from services.trainer.serving import load_at, serve
from shared.clients import BadReply, Refused
from shared.files import ArtifactError
from shared.serving import checked_weights, note_path, weights_to_serve
from shared.settings import changed

LOG = structlog.get_logger()


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
    assert world.loaded == []
    assert not note_path(settings).exists()


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


def test_a_hugging_face_id_passes_and_a_missing_folder_does_not() -> None:
    assert checked_weights("Qwen/Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"
    with pytest.raises(ArtifactError, match="run the stage that publishes them"):
        checked_weights("/nowhere/weights")

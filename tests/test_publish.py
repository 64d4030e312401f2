"""Published weights are those that were rewarded; then their checkpoints go, and no others."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import structlog
from round_world import publish_files, publish_weights_at, settings_at, world_of

from services.trainer.checkpoints import keep_copy, newest_checkpoint
from services.trainer.disk_parts import part_of
from services.trainer.disk_plan import Origin
from services.trainer.paths import RunPaths, run_paths
from services.trainer.publish import (
    INDEX,
    copy_weights,
    publish_last_good,
    publish_solver,
    publish_weights,
    weight_change,
)
from services.trainer.rounds import paths_of
from services.trainer.storage import free
from services.trainer.train import begin_or_resume, finished, train, training_origin, training_settings
from shared.files import ArtifactError, hash_json, publish, read_manifest, write_atomically
from shared.settings import Settings, changed

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

LOG = structlog.get_logger()
VALUES = torch.tensor([1.0, 1.00390625, -0.1, 3e-39])  # the second is between two numbers of bfloat16
ROUNDED = VALUES.to(torch.bfloat16)


def write_checkpoint(paths: RunPaths, step: int) -> Path:
    """A complete checkpoint with two numbers of weights, in float32 as verl writes them."""
    folder = paths.checkpoints / f"global_step_{step}"
    files = folder / "actor" / "huggingface"
    files.mkdir(parents=True)
    safetensors.save_file({"weight": VALUES * step}, files / "model.safetensors")
    (files / "config.json").write_text(json.dumps({"dtype": "float32", "hidden_size": 4}))
    (folder / "actor" / "model_world_size_1_rank_0.pt").write_bytes(b"x")
    zipfile.ZipFile(folder / "data.pt", "w").close()
    return folder


def trained(settings: Settings) -> RunPaths:
    """A finished training whose checkpoints of two steps are there."""
    paths = run_paths(settings)
    publish_files(paths.index, {"index": "made"})
    publish_files(paths.seeds, {"seeds": "drawn"})
    shape, origin = training_settings(settings), training_origin(settings, paths)
    write_atomically(paths.work / "state.json", json.dumps({"key": hash_json([shape, origin])}))
    for step in (1, 2):
        write_checkpoint(paths, step)
    with publish(paths.training, settings=shape, made_from=origin):
        pass
    return paths


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_at(tmp_path, trainer__steps=2, trainer__prompts_per_step=1)


# ---- precision -------------------------------------------------------------------------------------------------------


def save_tiny(folder: Path, shard: str) -> Any:
    """A random model in float32, in files of at most so many bytes."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize(("shard", "files"), [("5GB", 1), ("40KB", 3)])
def test_weights_in_one_file_or_several_are_the_trained_ones_rounded_once_and_load_as_such(
    tmp_path: Path, shard: str, files: int
) -> None:
    model = save_tiny(tmp_path / "step" / "actor" / "huggingface", shard)
    folder = tmp_path / "weights"
    folder.mkdir()
    copy_weights(tmp_path / "step", folder, dtype="bfloat16")
    assert len(list(folder.glob("*.safetensors"))) == files
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name].to(torch.bfloat16)) for name, tensor in loaded.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert weight_change(tmp_path / "step" / "actor" / "huggingface", folder)["changed_tensors"] == 0
    if files > 1:
        index = json.loads((folder / INDEX).read_text())
        size = sum(t.nbytes for f in folder.glob("*.safetensors") for t in safetensors.load_file(f).values())
        assert index["metadata"]["total_size"] == size
        assert {folder / name for name in index["weight_map"].values()} == set(folder.glob("*.safetensors"))


def test_numbers_that_are_whole_stay_and_an_old_name_of_the_precision_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "step" / "actor" / "huggingface"
    source.mkdir(parents=True)
    safetensors.save_file({"weight": VALUES, "ids": torch.arange(300)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    copy_weights(tmp_path / "step", tmp_path, dtype="bfloat16")
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["weight"], ROUNDED)
    assert torch.equal(found["ids"], torch.arange(300))
    assert json.loads((tmp_path / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_without_a_precision_of_its_own_every_file_stays_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "step" / "actor" / "huggingface"
    save_tiny(source, "40KB")
    folder = tmp_path / "weights"
    folder.mkdir()
    copy_weights(tmp_path / "step", folder, dtype="auto")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {f.name: f.read_bytes() for f in source.iterdir()}


def test_the_last_good_weights_have_the_precision_too(settings: Settings) -> None:
    paths = trained(settings)
    publish_last_good(settings, paths, (1, paths.checkpoints / "global_step_1"))
    assert torch.equal(safetensors.load_file(paths.last_good / "model.safetensors")["weight"], ROUNDED)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_once_weights_are_published_their_checkpoints_are_gone_and_nothing_else_is(settings: Settings) -> None:
    paths = trained(settings)
    keep_copy(paths.checkpoints, paths.good, through=1)
    publish_last_good(settings, paths, (1, paths.checkpoints / "global_step_1"))
    publish_weights(settings, paths, LOG)
    assert not paths.checkpoints.exists()
    found = safetensors.load_file(paths.weights / "model.safetensors")["weight"]
    assert torch.equal(found, (VALUES * 2).to(torch.bfloat16))
    assert newest_checkpoint(paths.good) == (1, paths.good / "global_step_1")
    assert read_manifest(paths.last_good, verify=True)
    assert (paths.work / "state.json").is_file()


@pytest.mark.parametrize("left", ["all", "half"])
def test_what_a_kill_after_publishing_leaves_of_checkpoints_goes_with_the_next_run(
    settings: Settings, left: str
) -> None:
    paths = trained(settings)
    shutil.copytree(paths.checkpoints, paths.work / "copy")
    publish_weights(settings, paths, LOG)
    weights = paths.weights.readlink()
    (paths.work / "copy").rename(paths.checkpoints)
    if left == "half":
        (paths.checkpoints / "global_step_2" / "data.pt").unlink()
    publish_weights(settings, paths, LOG)
    assert not paths.checkpoints.exists()
    assert paths.weights.readlink() == weights


def test_a_finished_training_without_checkpoints_is_not_trained_again(settings: Settings) -> None:
    paths = trained(settings)
    publish_weights(settings, paths, LOG)
    train(settings, paths, LOG)
    publish_weights(settings, paths, LOG)
    assert not paths.checkpoints.exists()


@pytest.mark.parametrize("change", [{"trainer.temperature": 0.5}, {"trainer.steps": 3}])
def test_a_training_of_other_settings_or_of_more_steps_begins_afresh_and_keeps_its_checkpoints(
    settings: Settings, change: dict[str, float]
) -> None:
    paths = trained(settings)
    publish_weights(settings, paths, LOG)
    other = changed(settings, change)
    begin_or_resume(paths, hash_json([training_settings(other), training_origin(other, paths)]), LOG)
    write_checkpoint(paths, 1)
    publish_weights(settings, paths, LOG)  # of the finished training, which is still the published one
    assert newest_checkpoint(paths.checkpoints) == (1, paths.checkpoints / "global_step_1")


def test_a_training_whose_record_was_deleted_begins_at_its_first_step(settings: Settings) -> None:
    paths = trained(settings)
    publish_weights(settings, paths, LOG)
    key = hash_json([training_settings(settings), training_origin(settings, paths)])
    paths.training.unlink()
    begin_or_resume(paths, key, LOG)
    assert newest_checkpoint(paths.checkpoints) is None
    assert not finished(settings, paths)


@pytest.mark.parametrize(("role", "stage"), [("proposer", "1.train"), ("solver", "1.solver_train")])
def test_missing_weights_whose_checkpoints_are_gone_are_an_error_that_says_what_to_do(
    settings: Settings, role: str, stage: str
) -> None:
    own = changed(settings, {"trainer.role": role})
    paths = trained(own)
    publish_weights(own, paths, LOG)
    paths.weights.unlink()
    with pytest.raises(ArtifactError, match=rf"found none .*delete {paths.training} and run again from {stage}"):
        publish_weights(own, paths, LOG)


def test_a_solvers_weights_are_served_unless_a_later_round_has_its_own(tmp_path: Path) -> None:
    with world_of(lambda _: "") as world:
        settings = settings_at(
            tmp_path, world.url, trainer__steps=2, trainer__prompts_per_step=1, trainer__role="solver"
        )
        paths = trained(settings)
        publish_solver(settings, paths, LOG)
        assert world.loaded == [str(paths.weights.resolve())]
        publish_weights_at(paths_of(settings, 2, "solver").weights, "later")
        world.model = "what is served now"
        free(part_of(paths.weights, "weights", Origin("kept"), tensors_only=True))
        publish_solver(settings, paths, LOG)
    assert world.model == "what is served now"


def test_weights_that_are_not_of_the_last_step_are_not_published(settings: Settings) -> None:
    paths = trained(settings)
    shutil.rmtree(paths.checkpoints / "global_step_2")
    with pytest.raises(ArtifactError, match=r"expected the checkpoint of step 2 .* found 1"):
        publish_weights(settings, paths, LOG)
    assert newest_checkpoint(paths.checkpoints) is not None

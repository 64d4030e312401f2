"""Every profile's overrides compose against verl's own configuration tree, and say what the settings say."""

from pathlib import Path

import pytest

from services.trainer.overrides import verl_overrides
from services.trainer.paths import run_paths
from shared.settings import build_settings, profiles

hydra = pytest.importorskip("hydra", reason="verl's configuration needs hydra, which only the trainer installs")


@pytest.mark.parametrize("profile", profiles())
@pytest.mark.parametrize("resume_from", [None, "/scratch/checkpoints/global_step_2"])
def test_a_profile_composes_against_verls_tree(profile: str, resume_from: str | None) -> None:
    verl = pytest.importorskip("importlib.util").find_spec("verl")
    settings = build_settings({"DRZERO_PROFILE": profile})
    overrides = verl_overrides(settings, run_paths(settings), model="/models/x", resume_from=resume_from)
    folder = str(Path(verl.submodule_search_locations[0]) / "trainer" / "config")
    with hydra.initialize_config_dir(folder, version_base=None):
        config = hydra.compose("ppo_trainer", overrides=[o for o in overrides if not o.startswith("hydra.")])
    trainer = settings.trainer
    assert config.data.train_batch_size == trainer.prompts_per_step
    assert config.actor_rollout_ref.rollout.n == trainer.rollouts_per_prompt
    assert config.actor_rollout_ref.actor.optim.lr == trainer.actor.learning_rate
    assert config.actor_rollout_ref.rollout.name == trainer.actor.rollout_engine
    assert config.trainer.total_training_steps == trainer.steps
    assert config.trainer.resume_mode == ("disable" if resume_from is None else "resume_path")


@pytest.mark.parametrize("profile", profiles())
def test_batches_divide_among_the_devices(profile: str) -> None:
    settings = build_settings({"DRZERO_PROFILE": profile}).trainer
    sequences = settings.prompts_per_step * settings.rollouts_per_prompt
    assert sequences % (settings.actor.gpus * settings.actor.nodes) == 0

"""Every profile's overrides compose against verl's own configuration tree, and say what the settings say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.trainer.checks import arithmetic_problems, batch_problems
from services.trainer.overrides import cluster_overrides, verl_overrides
from services.trainer.paths import run_paths
from services.trainer.rounds import paths_of, solver_settings
from shared.files import publish
from shared.settings import Settings, build_settings, profiles

hydra = pytest.importorskip("hydra", reason="verl's configuration needs hydra, which only the trainer installs")


def compose(settings: Settings, resume_from: str | None = None, *, more: Sequence[str] = ()) -> Any:
    """verl's configuration with the overrides of these settings."""
    verl = pytest.importorskip("importlib.util").find_spec("verl")
    overrides = verl_overrides(settings, run_paths(settings), model="/models/x", resume_from=resume_from)
    overrides += more
    folder = str(Path(verl.submodule_search_locations[0]) / "trainer" / "config")
    with hydra.initialize_config_dir(folder, version_base=None):
        return hydra.compose("ppo_trainer", overrides=[o for o in overrides if not o.startswith("hydra.")])


@pytest.mark.parametrize("profile", profiles())
@pytest.mark.parametrize("resume_from", [None, "/scratch/checkpoints/global_step_2"])
def test_a_profile_composes_against_verls_tree(profile: str, resume_from: str | None) -> None:
    settings = build_settings({"DRZERO_PROFILE": profile})
    config, trainer = compose(settings, resume_from), settings.trainer
    assert config.data.train_batch_size == trainer.prompts_per_step
    assert config.actor_rollout_ref.rollout.n == trainer.rollouts_per_prompt
    assert config.actor_rollout_ref.actor.optim.lr == trainer.actor.learning_rate
    assert config.actor_rollout_ref.rollout.name == trainer.actor.rollout_engine
    assert config.trainer.total_training_steps == trainer.steps
    assert config.trainer.resume_mode == ("disable" if resume_from is None else "resume_path")


@pytest.mark.parametrize("profile", profiles())
def test_the_solvers_own_training_composes_too_and_says_what_the_round_says(tmp_path: Path, profile: str) -> None:
    given = build_settings({"DRZERO_PROFILE": profile, "DRZERO_STORAGE__DATA_DIR": str(tmp_path)})
    questions = paths_of(given, 2, "solver").questions
    with publish(questions, settings={}, made_from={}) as draft:
        draft.counts = {"train": 500, "held_out": 50}
    settings = solver_settings(given, 2)
    config, own = compose(settings), given.trainer.solver
    assert config.data.train_files == str(paths_of(given, 2, "solver").seeds / "train.parquet")
    assert config.data.train_batch_size == own.prompts_per_step
    assert config.actor_rollout_ref.rollout.n == own.rollouts_per_prompt
    assert config.actor_rollout_ref.rollout.temperature == own.temperature
    assert config.actor_rollout_ref.rollout.multi_turn.max_assistant_turns == given.trainer.reward.max_turns
    assert config.actor_rollout_ref.actor.optim.lr == own.learning_rate
    assert config.trainer.total_training_steps == own.steps
    assert config.trainer.default_local_dir == str(paths_of(given, 2, "solver").checkpoints)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (
        own.prompt_tokens,
        settings.trainer.response_tokens,
    )
    assert arithmetic_problems(settings) == []


@pytest.mark.parametrize("rank", [0, 16])
def test_lora_reaches_verl_and_sglang_is_given_merged_weights(rank: int) -> None:
    given = {"DRZERO_PROFILE": "a100x1", "DRZERO_TRAINER__ACTOR__LORA_ALPHA": "48"}
    model = compose(build_settings(given | {"DRZERO_TRAINER__ACTOR__LORA_RANK": str(rank)})).actor_rollout_ref.model
    assert (model.lora_rank, model.lora_alpha, model.lora.merge) == (rank, 48, rank > 0)
    assert model.target_modules == "all-linear"


@pytest.mark.parametrize(("attention", "packed"), [("sdpa", False), ("varlen", True)])
def test_packed_sequences_reach_verl_and_the_checkpoint_names_an_attention_that_servers_know(
    attention: str, packed: bool
) -> None:
    given = {"DRZERO_PROFILE": "a100x1", "DRZERO_TRAINER__ACTOR__ATTENTION": attention}
    settings = build_settings(given | {"DRZERO_TRAINER__ACTOR__MICRO_BATCH": "3"})
    chosen, trainer = compose(settings).actor_rollout_ref, settings.trainer
    assert (chosen.model.use_remove_padding, chosen.model.use_fused_kernels) == (packed, packed)
    assert chosen.actor.use_dynamic_bsz == chosen.rollout.log_prob_use_dynamic_bsz == packed
    assert chosen.actor.ppo_max_token_len_per_gpu == 3 * (trainer.prompt_tokens + trainer.response_tokens)
    assert chosen.model.override_config.attn_implementation == "sdpa"


@pytest.mark.parametrize(("between", "always"), [(False, False), (True, False), (False, True)])
def test_what_is_offloaded_reaches_verl(between: bool, always: bool) -> None:
    given = {
        "DRZERO_PROFILE": "a100x1",
        "DRZERO_TRAINER__ACTOR__OFFLOAD": str(between),
        "DRZERO_TRAINER__ACTOR__OFFLOAD_UPDATE": str(always),
    }
    fsdp = compose(build_settings(given)).actor_rollout_ref.actor.fsdp_config
    assert (fsdp.param_offload, fsdp.optimizer_offload, fsdp.offload_policy) == (between, between, always)


def test_the_rollout_engine_has_graphs_and_room_for_a_cards_share_of_a_step() -> None:
    settings = build_settings({"DRZERO_PROFILE": "a100x8"})
    engine = compose(settings).actor_rollout_ref.rollout.engine_kwargs.sglang
    assert (engine.cuda_graph_max_bs, engine.chunked_prefill_size) == (32, 4096)
    assert engine.max_total_tokens == 32 * 4096
    many = build_settings({"DRZERO_PROFILE": "a100x1", "DRZERO_TRAINER__ROLLOUTS_PER_PROMPT": "16"})
    assert compose(many).actor_rollout_ref.rollout.engine_kwargs.sglang.cuda_graph_max_bs == 256


@pytest.mark.parametrize("profile", ["a100x1", "a100x8"])
@pytest.mark.parametrize("gpus", range(1, 10))
def test_any_number_of_gpus_that_divides_the_batch_will_do_and_no_other(profile: str, gpus: int) -> None:
    settings = build_settings({"DRZERO_PROFILE": profile, "DRZERO_GPUS": str(gpus)})
    config = compose(settings)
    assert (config.trainer.n_gpus_per_node, config.ray_kwargs.ray_init.num_gpus) == (gpus, gpus)
    assert bool(batch_problems(settings.trainer)) == (gpus not in (1, 2, 4, 8))


@pytest.mark.parametrize("profile", profiles())
def test_batches_divide_among_the_devices(profile: str) -> None:
    settings = build_settings({"DRZERO_PROFILE": profile}).trainer
    sequences = settings.prompts_per_step * settings.rollouts_per_prompt
    assert sequences % (settings.actor.gpus * settings.actor.nodes) == 0


def test_a_cluster_that_is_joined_keeps_its_size_and_is_told_the_environment() -> None:
    given = {"DRZERO_PROFILE": "a100x1", "DRZERO_TRAINER__RAY_ADDRESS": "10.0.0.1:6379"}
    settings = build_settings(given)
    variables = {"DRZERO_TRAINER__RUN": "7", "PYTHONPATH": '/a b:/c,d=e"f', "DRZERO_INGEST__QUERY": "[x] AND {y}"}
    joined = compose(settings, more=cluster_overrides(variables)).ray_kwargs.ray_init
    assert joined.address == "10.0.0.1:6379"
    assert joined.num_cpus is None
    assert not {"num_gpus", "object_store_memory"} & set(joined)
    assert dict(joined.runtime_env.env_vars) == variables
    assert "address" not in compose(build_settings({"DRZERO_PROFILE": "a100x1"})).ray_kwargs.ray_init

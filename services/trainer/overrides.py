"""Settings → verl's Hydra overrides: one pure function, the only place that names verl's keys.

Composed against verl's own configuration in a test, for every profile. Batch sizes: verl's train_batch_size counts
prompts; with mini-batch = batch and one epoch the update is strictly on-policy, so the clipped ratio is 1.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from services.trainer.paths import RunPaths
from services.trainer.protocol import PARSER, TRAINER
from shared.hardware import cpu_dtype
from shared.settings import LARGEST_GRAPH, ActorSettings, Settings, TrainerSettings

MAX_PARALLEL_CALLS = 4  # search calls that are carried out in one turn; further ones count as failed
RAY_CPUS = 64  # logical: verl's many small actors each claim one; it bounds nothing
MEMORY_SHARE = 0.9  # bounds the KV pool, whose size is `max_total_tokens`


def verl_overrides(settings: Settings, paths: RunPaths, *, model: str, resume_from: str | None) -> list[str]:
    """The command line of verl.trainer.main_ppo. `model` is a folder or Hugging Face id, `resume_from` a checkpoint."""
    trainer, actor = settings.trainer, settings.trainer.actor
    sequences = trainer.prompts_per_step * trainer.rollouts_per_prompt
    values: dict[str, Any] = {
        # Only a name to verl: verl_trainer.py computes `trainer.advantage` itself, hops and invalid rollouts included.
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        # --- data
        "data.train_files": str(paths.seeds / "train.parquet"),
        "data.val_files": str(paths.seeds / "held_out.parquet"),
        "data.train_batch_size": trainer.prompts_per_step,
        "data.val_batch_size": trainer.eval_seeds,
        "data.max_prompt_length": trainer.prompt_tokens,
        "data.max_response_length": trainer.response_tokens,
        "data.dataloader_num_workers": 0,
        "data.shuffle": False,  # seeds.py has shuffled and spread the hops
        "data.seed": trainer.seed,
        "data.filter_overlong_prompts": False,
        "data.truncation": "error",
        # --- the model and its update
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.model.use_remove_padding": actor.packed,
        "actor_rollout_ref.model.use_fused_kernels": actor.packed,
        "actor_rollout_ref.model.enable_gradient_checkpointing": actor.gradient_checkpointing,
        "actor_rollout_ref.model.lora_rank": actor.lora_rank,
        "actor_rollout_ref.model.lora_alpha": actor.lora_alpha,
        # SGLang is given merged weights as without LoRA; serving the adapter beside the base is a way of its own.
        "actor_rollout_ref.model.lora.merge": actor.lora_rank > 0,
        # verl writes this into every checkpoint's config.json, and no server knows our own: packed_engine.py sets that.
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa" if actor.packed else actor.attention,
        "actor_rollout_ref.actor.strategy": "fsdp2",
        "actor_rollout_ref.actor.optim.lr": actor.learning_rate,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": math.ceil(actor.warmup_share * trainer.steps),
        # One kernel over all weights: the usual step holds another copy of them.
        "actor_rollout_ref.actor.optim.override_optimizer_config": "{fused:true}" if fused_adamw(actor) else "null",
        "actor_rollout_ref.actor.grad_clip": actor.max_grad_norm,
        "actor_rollout_ref.actor.ppo_mini_batch_size": trainer.prompts_per_step,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": actor.micro_batch,
        "actor_rollout_ref.actor.use_dynamic_bsz": actor.packed,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": actor.micro_batch
        * (trainer.prompt_tokens + trainer.response_tokens),
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.model_dtype": "fp32" if actor.master_dtype == "float32" else "bf16",
        "actor_rollout_ref.actor.fsdp_config.dtype": cpu_dtype(actor.dtype),
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": actor.packed and actor.compile_layers,
        "actor_rollout_ref.actor.fsdp_config.param_offload": actor.offload,
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload": actor.offload,
        "actor_rollout_ref.actor.fsdp_config.offload_policy": actor.offload_update,
        "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        # --- rollouts
        "actor_rollout_ref.rollout.name": actor.rollout_engine,
        "actor_rollout_ref.rollout.n": trainer.rollouts_per_prompt,
        "actor_rollout_ref.rollout.temperature": trainer.temperature,
        "actor_rollout_ref.rollout.dtype": cpu_dtype(actor.rollout_dtype),
        "actor_rollout_ref.rollout.seed": trainer.seed,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.gpu_memory_utilization": MEMORY_SHARE,
        "actor_rollout_ref.rollout.max_num_seqs": min(1024, sequences),
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": actor.micro_batch,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        # Guided turns need the engine to know the tokenizer.
        "actor_rollout_ref.rollout.skip_tokenizer_init": not trainer.guided_tool_call,
        "actor_rollout_ref.rollout.multi_turn.enable": True,
        "actor_rollout_ref.rollout.multi_turn.max_assistant_turns": trainer.max_turns,
        "actor_rollout_ref.rollout.multi_turn.max_parallel_calls": MAX_PARALLEL_CALLS,
        "actor_rollout_ref.rollout.multi_turn.tool_config_path": str(paths.tools_file),
        "actor_rollout_ref.rollout.multi_turn.format": PARSER,
        "actor_rollout_ref.rollout.agent.num_workers": trainer.agent_workers,
        "+actor_rollout_ref.rollout.agent.agent_loop_manager_class": "services.trainer.early_workers.EarlyWorkers",
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": str(paths.agents_file),
        "actor_rollout_ref.rollout.val_kwargs.temperature": 0,
        # --- reward
        "reward.num_workers": trainer.reward_workers,
        "reward.custom_reward_function.path": "pkg://services.trainer.reward",
        "reward.custom_reward_function.name": "compute_score",
        # --- the run
        "trainer.v1.trainer_mode": TRAINER,
        "trainer.device": actor.device,
        "trainer.n_gpus_per_node": actor.gpus,
        "trainer.nnodes": actor.nodes,
        "trainer.project_name": "drzero",
        "trainer.experiment_name": trainer.run,
        # verl drops the incomplete last batch of each pass over the seeds.
        "trainer.total_epochs": math.ceil(trainer.steps / (trainer.seeds // trainer.prompts_per_step)) + 1,
        "trainer.total_training_steps": trainer.steps,
        "trainer.logger": ["console", "file"],
        "trainer.save_freq": trainer.save_every,
        "trainer.max_actor_ckpt_to_keep": trainer.keep_checkpoints,
        "trainer.default_local_dir": str(paths.checkpoints),
        "trainer.val_before_train": resume_from is None,
        "trainer.test_freq": trainer.steps,
        "trainer.resume_mode": "disable" if resume_from is None else "resume_path",
        # --- Ray
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": trainer.storage_units,
        **_ray(trainer),
        "hydra.run.dir": str(paths.work / "hydra"),
        "hydra.output_subdir": "null",
    }
    if resume_from is not None:
        values["trainer.resume_from_path"] = resume_from
    values |= {
        f"+actor_rollout_ref.rollout.engine_kwargs.sglang.{name}": value
        for name, value in (
            ("attention_backend", settings.solver.sglang.attention_backend),
            ("sampling_backend", settings.solver.sglang.sampling_backend),
            ("grammar_backend", settings.solver.sglang.grammar_backend),
            ("chunked_prefill_size", settings.solver.sglang.chunked_prefill_tokens),
            # Graphs for larger batches than a card's share of a step would only cost start time and memory.
            ("cuda_graph_max_bs", min(LARGEST_GRAPH, trainer.rollouts_per_card)),
            ("max_total_tokens", trainer.kv_tokens),
            ("disable_piecewise_cuda_graph", True),
        )
    }
    return [f"{key}={_hydra(value)}" for key, value in values.items()]


def fused_adamw(actor: ActorSettings) -> bool:
    """Whether the optimizer's step is one CUDA kernel."""
    return actor.device == "cuda" and not actor.offload_update


def _ray(trainer: TrainerSettings) -> dict[str, Any]:
    if trainer.ray_address is not None:  # what the cluster has was said when it was started
        return {"+ray_kwargs.ray_init.address": trainer.ray_address}
    return {
        "+ray_kwargs.ray_init.num_gpus": trainer.actor.gpus,
        "ray_kwargs.ray_init.num_cpus": RAY_CPUS,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.object_store_memory": int(trainer.object_store_gb * 1e9),
    }


def cluster_overrides(variables: Mapping[str, str]) -> list[str]:
    """The environment of the processes that a cluster starts for us: theirs is that of `ray start`, not ours."""
    prefix = "+ray_kwargs.ray_init.runtime_env.env_vars"
    return [f"{prefix}.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in sorted(variables.items())]


def _hydra(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return json.dumps(value) if isinstance(value, bool) else str(value)

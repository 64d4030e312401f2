"""How the services share a card: `python -m shared.memory_plan [--card-gb 80]` prints GB by service and part.

In: settings, the models' shapes and a card's size. Out: parts that add up. `always` parts are there all the time; of
the phases `rollout` (the engine generates), `backward` and `step` (the weights are updated) only one runs at a time, so
the peak is always + the largest phase. Estimates that lean to the large side, meant to be read beside a measured peak.
Retrieval, solver, trainer and rollout engine share every card; GB are 2³⁰ bytes, as a card's name counts them.

    solver = weights + keys and values of all requests that may run at once + what SGLang needs besides
    rollout engine = the same for all rollouts of a step
    update = weights + gradients + AdamW's two moments + activations + logits
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import structlog

from shared.command import UsageError, run
from shared.hardware import GIB, gpus
from shared.model_shapes import Shape, model_shape
from shared.settings import Settings

DRIVER_GB = 0.75  # of a card's memory that CUDA never gives out: an A100 of 80 GB offers 79.25
CONTEXT_GB = 0.6  # CUDA context, kernels and cuBLAS workspace of one process
NCCL_GB = 1.0  # communication buffers of a trainer on several cards
# What SGLang 0.5.12 sets aside in server_args.py: 0.5 GB for attention metadata, here twice that, and 2 MB for each
# sequence of the largest captured batch.
ENGINE_GB = 1.0
GRAPH_GB = 2 / 1024
# Bytes for each value of the logits, tokens × vocabulary, in verl 0.9.1's padded path (`prepare_model_outputs`, then
# `logprobs_from_logits_v2`): bf16 logits 2, divided by the temperature 2, packed 2, float32 log-softmax 4.
LOGIT_BYTES = 10
# The same in our packed path, which holds one chunk of them (services/trainer/token_log_probs.py): bf16 logits and
# gradient, and float32 in between; an H200 held 2.1 GB for 2²⁸ values.
CHUNK_LOGITS, CHUNK_BYTES = 1 << 28, 8
# Bytes that autograd keeps per token and layer of a Llama or Qwen2 block in bf16, per hidden and per intermediate
# value: counted with torch's saved-tensor hooks on a CPU (24.5 to 25.1 and 8.0). With gradient checkpointing 2 bytes
# per hidden value are kept of each layer, and one layer is computed again.
HIDDEN_BYTES, INTERMEDIATE_BYTES = 25, 8
# The same without a backward pass: what one layer holds at once.
FORWARD_HIDDEN_BYTES, FORWARD_INTERMEDIATE_BYTES = 10, 6

SCORES_GB = 0.3  # of one part of the vectors, and the maxima of their groups: services/retrieval/card_index.py

Phase = Literal["always", "rollout", "backward", "step"]
PHASES: tuple[Phase, ...] = ("rollout", "backward", "step")


POOLS = {"solver": "DRZERO_SOLVER__SGLANG__KV_TOKENS", "rollout engine": "DRZERO_TRAINER__ACTOR__KV_TOKENS"}
REMEDIES: dict[Phase, str] = {
    "rollout": "set DRZERO_TRAINER__ACTOR__KV_TOKENS or DRZERO_SOLVER__SGLANG__KV_TOKENS to less than the plan shows, "
    "or DRZERO_TRAINER__ACTOR__OFFLOAD=true",
    "backward": "lower DRZERO_TRAINER__ACTOR__MICRO_BATCH, DRZERO_TRAINER__RESPONSE_TOKENS or "
    "DRZERO_SOLVER__MAX_RUNNING, set DRZERO_TRAINER__ACTOR__LORA_RANK=32, or use a smaller model",
    "step": "set DRZERO_TRAINER__ACTOR__LORA_RANK=32 or DRZERO_TRAINER__ACTOR__OFFLOAD_UPDATE=true, or use a smaller "
    "model or more cards (DRZERO_GPUS)",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the plan; with less than `least_gb` the service does not run."""

    service: str
    name: str
    gb: float
    phase: Phase = "always"
    least_gb: float = 0.0


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of the three models."""

    encoder: Shape
    solver: Shape
    actor: Shape


def known_shapes(settings: Settings) -> Shapes | None:
    """The shapes of the settings' models; None while one of them is not known on this machine."""
    encoder = model_shape(settings.retrieval.encoder.model)
    solver, actor = model_shape(settings.solver.model), model_shape(settings.trainer.actor.model)
    return Shapes(encoder, solver, actor) if encoder and solver and actor else None


def memory_plan(settings: Settings, shapes: Shapes) -> list[Part]:
    """What the fullest card holds; services that do not use a GPU have no part in it."""
    parts = [Part("driver", "never given out", DRIVER_GB)]
    if settings.retrieval.encoder.device != "cpu":
        parts += retrieval_parts(settings, shapes.encoder)
    if settings.solver.engine == "sglang":
        parts += solver_parts(settings, shapes.solver)
    if settings.trainer.actor.device == "cuda":
        parts += [*trainer_parts(settings, shapes.actor), *rollout_parts(settings, shapes.actor)]
    return parts


def retrieval_parts(settings: Settings, shape: Shape) -> list[Part]:
    """Encoder, one batch of texts in it, and what the search has on the card: vectors in float16 and some scores."""
    encoder = settings.retrieval.encoder
    size = 4 if encoder.dtype == "float32" else 2
    batch = encoder.batch_size * encoder.max_tokens * _forward_bytes(shape) * size / 2
    parts = [
        Part("retrieval", "CUDA context", CONTEXT_GB),
        Part("retrieval", "encoder weights", shape.parameters * size / GIB),
        Part("retrieval", "one batch of texts", batch / GIB),
    ]
    if settings.retrieval.index.device == "cpu":
        return parts
    records = settings.ingest.max_records
    return [
        *parts,
        Part("retrieval", f"vectors of {records:,} papers", records * shape.hidden * 2 / GIB),
        Part("retrieval", "scores of one search", SCORES_GB),
    ]


def solver_parts(settings: Settings, shape: Shape) -> list[Part]:
    """SGLang: weights, a KV pool of `max_total_tokens`, graphs and passes.

    Source: `_apply_token_constraints` and `_handle_gpu_memory_settings` of SGLang 0.5.12.
    """
    solver, sglang = settings.solver, settings.solver.sglang
    weights = shape.parameters * 2 / sglang.tp_size / GIB
    passes = _engine_gb(settings, shape, sequences=solver.running_per_copy, graphs=solver.cuda_graph_max_bs)
    return [
        Part("solver", "CUDA context", CONTEXT_GB),
        Part("solver", "weights, bf16", weights),
        _kv_pool("solver", solver.kv_tokens, shape, longest=solver.context_tokens, split=sglang.tp_size),
        Part("solver", "graphs and forward passes", passes),
    ]


def trainer_parts(settings: Settings, shape: Shape) -> list[Part]:
    """The update by FSDP2: states by trained weight, activations and logits by token of a micro-batch.

    States: weights, gradients and AdamW's m and v in the master precision, split over the cards. The step itself holds
    nothing more (fused AdamW). FSDP2 keeps the sum of a step's gradients whole until it splits it among several cards.
    """
    trainer, actor = settings.trainer, settings.trainer.actor
    size, cards = (4 if actor.master_dtype == "float32" else 2), actor.gpus * actor.nodes
    trained = shape.layers * actor.lora_rank * shape.lora_width if actor.lora_rank else shape.parameters
    kept = shape.parameters + (trained if actor.lora_rank else 0)
    on_card = 0.0 if actor.offload_update else size / cards / GIB
    at_rest: tuple[Phase, ...] = ("backward", "step") if actor.offload else ("always",)
    tokens = actor.micro_batch * (trainer.prompt_tokens + trainer.response_tokens)
    logits = tokens * shape.vocabulary
    logit_bytes = min(logits, CHUNK_LOGITS) * CHUNK_BYTES if actor.packed else logits * LOGIT_BYTES
    layer = HIDDEN_BYTES * shape.hidden + INTERMEDIATE_BYTES * shape.intermediate
    saved = 2 * shape.hidden * shape.layers + layer if actor.gradient_checkpointing else layer * shape.layers
    embedding = shape.vocabulary * shape.hidden
    two_layers = 2 * (shape.parameters - embedding) / shape.layers
    return [
        Part("trainer", "CUDA context", CONTEXT_GB),
        *([Part("trainer", "communication buffers", NCCL_GB)] if cards > 1 else []),
        *(Part("trainer", "weights", kept * on_card, phase) for phase in at_rest),
        *(Part("trainer", "AdamW state", 2 * trained * on_card, phase) for phase in at_rest),
        *(Part("trainer", "gradients", trained * on_card, phase) for phase in ("backward", "step")),
        # bf16 copies of embeddings and two layers that FSDP gathers, and as many gradients before they are split.
        Part("trainer", "gathered by FSDP", (2 if actor.lora_rank else 4) * (embedding + two_layers) / GIB, "backward"),
        Part("trainer", f"activations of {tokens:,} tokens", tokens * saved / GIB, "backward"),
        Part("trainer", "logits", logit_bytes / GIB, "backward"),
        *([Part("trainer", "gradients before they are split", trained * size / GIB, "backward")] if cards > 1 else []),
    ]


def rollout_parts(settings: Settings, shape: Shape) -> list[Part]:
    """verl's SGLang: weights and KV pool, both gone in the update, graphs and passes."""
    trainer, sequences = settings.trainer, settings.trainer.rollouts_per_card
    weights = shape.parameters * 2 / GIB
    passes = _engine_gb(settings, shape, sequences=sequences, graphs=min(256, sequences))
    return [
        Part("rollout engine", "CUDA context", CONTEXT_GB),
        Part("rollout engine", "graphs and forward passes", passes),
        Part("rollout engine", "weights, bf16", weights, "rollout"),
        _kv_pool("rollout engine", trainer.kv_tokens, shape, longest=trainer.prompt_tokens + trainer.response_tokens),
    ]


def _engine_gb(settings: Settings, shape: Shape, *, sequences: int, graphs: int) -> float:
    """What SGLang takes besides weights and KV pool: metadata, graphs, one chunk of prompts, logits being sampled."""
    chunk = settings.solver.sglang.chunked_prefill_tokens * _forward_bytes(shape)
    # bf16 logits, and three float32 copies while they are sampled from
    sampling = sequences * shape.vocabulary * 14
    return ENGINE_GB + graphs * GRAPH_GB + (chunk + sampling) / GIB


def _forward_bytes(shape: Shape) -> int:
    return FORWARD_HIDDEN_BYTES * shape.hidden + FORWARD_INTERMEDIATE_BYTES * shape.intermediate


def _kv_pool(service: str, tokens: int, shape: Shape, *, longest: int, split: int = 1) -> Part:
    """Room for keys and values, split over as many cards as a copy of the model; at least one longest text's."""
    per_token = shape.kv_bytes / split / GIB
    phase: Phase = "rollout" if service == "rollout engine" else "always"
    return Part(service, f"KV pool, {tokens:,} tokens", tokens * per_token, phase, longest * per_token)


def phase_gb(parts: Sequence[Part], phase: Phase) -> float:
    """What is on the card in a phase, in GB."""
    return sum(part.gb for part in parts if part.phase in ("always", phase))


def peak_gb(parts: Sequence[Part]) -> float:
    """The most that is on the card at once, in GB."""
    return max(phase_gb(parts, phase) for phase in PHASES)


def plan_problems(settings: Settings, parts: Sequence[Part], card_gb: float) -> list[str]:
    """Why the plan does not fit a card of this size, each with the settings to change; empty when it fits."""
    problems = [
        f"the {part.service} has {part.gb:.1f} GB for keys and values, expected at least the {part.least_gb:.1f} of "
        f"one longest text; raise {POOLS[part.service]}"
        for part in parts
        if part.gb < part.least_gb
    ]
    peak, phase = max((phase_gb(parts, name), name) for name in PHASES)
    if peak > card_gb:
        problems.append(
            f"profile {settings.profile} takes {peak:.1f} GB of a card at its peak (phase {phase}), found a card of "
            f"{card_gb:.1f} GB; {REMEDIES[phase]}"
        )
    return problems


def table(parts: Sequence[Part], card_gb: float) -> str:
    """The plan as a Markdown table; a phase's sum is in its own column."""
    columns: tuple[Phase, ...] = ("always", *PHASES)
    rows = [f"| service | part | {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * len(columns)]
    for service, name in dict.fromkeys((part.service, part.name) for part in parts):
        same = [part for part in parts if (part.service, part.name) == (service, name)]
        cells = [f"{sum(p.gb for p in same if p.phase == phase):.1f}" for phase in columns]
        rows.append(f"| {service} | {name} | {' | '.join('' if cell == '0.0' else cell for cell in cells)} |")
    sums = [sum(part.gb for part in parts if part.phase == "always"), *(phase_gb(parts, phase) for phase in PHASES)]
    rows.append(f"| **on the card** | of {card_gb:.1f} GB | {' | '.join(f'**{gb:.1f}**' for gb in sums)} |")
    return "\n".join(rows)


def main(settings: Settings, _: structlog.stdlib.BoundLogger, *, card_gb: float | None) -> None:
    """Print the plan; UsageError when it does not fit or cannot be made."""
    if card_gb is None:
        found = gpus()
        if found is None or not found.cards:
            raise UsageError("expected an NVIDIA GPU, found none; name a size instead: --card-gb 80")
        card_gb = min(card.memory_gb for card in found.cards)
    shapes = known_shapes(settings)
    if shapes is None:
        raise UsageError(
            "expected the config.json of every model on this machine; run `make doctor` to see which lacks"
        )
    parts = memory_plan(settings, shapes)
    print(table(parts, card_gb))
    if problems := plan_problems(settings, parts, card_gb):
        raise UsageError("; ".join(problems))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m shared.memory_plan", description="GPU memory by service.")
    parser.add_argument("--card-gb", type=float, help="size of a card; default: the smallest of this machine")
    raise SystemExit(run("memory_plan", partial(main, card_gb=parser.parse_args().card_gb)))

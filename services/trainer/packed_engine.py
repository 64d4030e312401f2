"""verl's FSDP engine for packed sequences: no padding, no logits over the whole batch, layers compiled if asked.

Registered by vendor in verl's own registry, where it goes before verl's class. It needs `use_remove_padding` and
`use_fused_kernels`; `fsdp_config.use_torch_compile` compiles the decoder layers. Without flash-attn verl's engine
computes each token's log-probability in a Python loop over tokens; here `token_log_probs.py` does it, for the tokens
of the responses alone.
"""

from types import MethodType
from typing import Any

import torch
from tensordict import TensorDict
from verl.models.transformers.dense_common import CausalLMOutputForPPO
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from services.trainer import varlen
from services.trainer.token_log_probs import token_log_probs


class PackedEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """The proposer's model and its update."""

    def _build_module(self) -> torch.nn.Module:
        if not (self.use_remove_padding and self.model_config.use_fused_kernels) or self.use_ulysses_sp:
            raise ValueError(
                "the packed engine expects model.use_remove_padding=true, model.use_fused_kernels=true and "
                "ulysses_sequence_parallel_size=1; see services/trainer/overrides.py"
            )
        module = super()._build_module()
        pack(module, compile_layers=self.engine_config.use_torch_compile)
        return module  # type: ignore[no-any-return]

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's inputs, and which tokens' log-probabilities anybody will read."""
        inputs, notes = super().prepare_model_inputs(micro_batch)
        if "responses" in micro_batch.keys() and micro_batch["responses"].is_nested:  # noqa: SIM118  a TensorDict
            inputs["wanted"] = before_responses(micro_batch["input_ids"].offsets(), micro_batch["responses"].offsets())
        return inputs, notes


def install() -> None:
    """Make verl train with this engine in this process."""
    for device, vendor in (("cuda", "nvidia"), ("cpu", "cpu")):
        EngineRegistry.register("language_model", backend="fsdp2", device=device, vendor=vendor)(PackedEngine)


def pack(model: torch.nn.Module, *, compile_layers: bool) -> None:
    """Give a causal language model of transformers our attention and the forward pass of verl's fused kernels."""
    varlen.register()
    # Set here and not by verl's `override_config`, which ends in the config.json of every checkpoint.
    model.set_attn_implementation(varlen.NAME)  # type: ignore[operator]
    if model.config._attn_implementation != varlen.NAME:  # type: ignore[union-attr]
        raise ValueError(
            f"expected a model whose attention can be exchanged, found {type(model).__name__}; "
            "set trainer.actor.attention=sdpa"
        )
    # The head keeps its place as a module: when FSDP shards it by itself, calling it is what gathers its weight.
    model.lm_head.forward = MethodType(head_forward, model.lm_head)  # type: ignore[union-attr]
    model.forward = MethodType(packed_forward, model)
    if compile_layers:
        for layer in model.model.layers:  # type: ignore[union-attr]
            # The bound method, not the module: FSDP's hooks stay outside, and the names of the weights as they are.
            layer.forward = torch.compile(layer.forward, dynamic=True)


def packed_forward(
    self: Any,
    *,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    shift_labels: torch.Tensor,
    temperature: float,
    wanted: torch.Tensor | None = None,
    **_: Any,
) -> CausalLMOutputForPPO:
    """Log-probability of the next token and entropy at each token of one packed row, both (1, tokens).

    verl passes `cu_seqlens` because this signature names them. At tokens outside `wanted` both are 0.
    """
    starts = cu_seqlens.to(torch.int32)
    longest = int(cu_seqlens_cpu.diff().max())
    hidden = self.model(
        input_ids=input_ids,
        attention_mask=None,
        position_ids=position_ids,
        use_cache=False,
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=longest,
        max_length_k=longest,
    )[0][0]
    if wanted is None:
        wanted = torch.arange(len(hidden), device=hidden.device)
    found = self.lm_head(hidden.index_select(0, wanted), shift_labels[0, wanted], temperature)
    nothing = hidden.new_zeros(shift_labels.shape, dtype=torch.float32)
    log_probs, entropy = (nothing.index_copy(1, wanted, values[None]) for values in found)
    return CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy)


def head_forward(
    self: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output projection and what is made of it, in place of `Linear.forward`."""
    return token_log_probs(hidden, self.weight, labels, temperature=temperature)


def before_responses(sequences: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Indices of the tokens whose next token belongs to a response, from the offsets of both in their packed rows."""
    ends, lengths, answers = sequences[1:], sequences.diff(), responses.diff()
    left = torch.repeat_interleave(ends, lengths) - torch.arange(int(sequences[-1]), device=sequences.device)
    return torch.nonzero((left > 1) & (left <= torch.repeat_interleave(answers, lengths) + 1)).flatten()

"""Attention over packed sequences: no padding is computed, and no token sees another sequence.

Registered with transformers as `varlen`. The batch is one row of all sequences end to end; where each begins comes from
transformers' own `cu_seq_lens_q` and `max_length_q`, or else from the position ids, which start again at 0. On a GPU in
half precision the kernel is torch's `varlen_attn` (flash attention from torch's own wheel, since 2.11); elsewhere every
sequence goes through `scaled_dot_product_attention` by itself.
"""

from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

NAME = "varlen"
CAUSAL = (-1, 0)
# torch 2.11 takes grouped heads as they come; later versions want to be told.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def register() -> None:
    """Make `varlen` an attention implementation of transformers in this process."""
    AttentionInterface.register(NAME, attend)
    # With it a padded batch brings its mask here and is refused; without it the mask would be dropped in silence.
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence, as transformers calls it.

    Shapes: query (1, heads, tokens, size), key and value (1, groups, tokens, size) → (1, tokens, heads, size).
    """
    if attention_mask is not None or query.shape[0] != 1 or dropout or sliding_window is not None:
        raise ValueError(
            f"attention `{NAME}` expects one row of packed sequences without mask, dropout or sliding window, found "
            f"{query.shape[0]} rows, mask {attention_mask is not None}, dropout {dropout}, window {sliding_window}; "
            "set trainer.actor.attention=sdpa for such a model or batch"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        if position_ids is None:
            raise ValueError(f"attention `{NAME}` expects cu_seq_lens_q and max_length_q, or position_ids; found none")
        cu_seq_lens_q, max_length_q = boundaries(position_ids)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        out = in_one_kernel(query, key, value, starts=cu_seq_lens_q, longest=max_length_q, scaling=scaling)
        return out[None], None
    return one_by_one(query, key, value, cu_seq_lens_q, scaling).transpose(1, 2), None


def in_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    """The flash kernel's (tokens, heads, size)."""
    return varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).contiguous(),
        value[0].transpose(0, 1).contiguous(),
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=CAUSAL,
        **GROUPED,
    )  # type: ignore[return-value]  # a tuple only when the log-sum-exp is asked for


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """The same with plain torch: (1, heads, tokens, size)."""
    pieces = [
        scaled_dot_product_attention(
            query[:, :, begin:end],
            key[:, :, begin:end],
            value[:, :, begin:end],
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        for begin, end in pairwise(starts.tolist())
    ]
    return torch.cat(pieces, dim=2)


def boundaries(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Starts of the sequences of one packed row with the end behind them (int32), and the longest one's length."""
    flat = position_ids.flatten()
    starts = torch.nonzero(flat == 0).flatten()
    starts = torch.cat([starts, starts.new_tensor([flat.numel()])]).to(torch.int32)
    return starts, int(starts.diff().max())

"""Log-probability and entropy of tokens from hidden states, without ever holding tokens × vocabulary.

The projection onto the vocabulary is made chunk by chunk, and once more in the backward pass: that costs a third of the
head's arithmetic, where keeping the logits would cost gigabytes. On a GPU the work between the matrix products is
compiled. With z = logits / temperature and p = softmax(z): log p_label = z_label − lse(z), H = lse(z) − Σ p·z;
∂log p_label/∂z = onehot − p, ∂H/∂z = −p·(log p + H).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

CHUNK_ELEMENTS = 1 << 28  # logits at once: 0.5 GB in bfloat16; smaller chunks make the matrix products slower


def token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy of each distribution, in nats: two float32 tensors of (tokens,).

    hidden (tokens, size), weight (vocabulary, size), labels (tokens,). Gradients flow to hidden and weight.
    """
    log_probs, entropy = _Head.apply(hidden, weight.to(hidden.dtype), labels, temperature)  # type: ignore[no-untyped-call]
    return log_probs, entropy


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        log_probs, lse, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        measure = _on(hidden, measured)
        for part in chunks(len(hidden), len(weight)):
            log_probs[part], lse[part], entropy[part] = measure(hidden[part] @ weight.T, labels[part], temperature)
        ctx.save_for_backward(hidden, weight, labels, lse, entropy)
        ctx.temperature = temperature
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, lse, entropy = ctx.saved_tensors
        of_log_probs, of_entropy = gradients
        if of_log_probs is None:
            of_log_probs = torch.zeros_like(lse)
        # The gradient of a weight in half precision is rounded once per chunk: few, since chunks are large.
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        differentiate = _on(hidden, differentiated)
        for part in chunks(len(hidden), len(weight)):
            upstream = of_log_probs[part], None if of_entropy is None else of_entropy[part]
            known = labels[part], lse[part], entropy[part]
            of_logits = differentiate(hidden[part] @ weight.T, known, upstream, ctx.temperature)
            if of_hidden is not None:
                of_hidden[part] = of_logits @ weight
            if of_weight is not None:
                of_weight.addmm_(of_logits.T, hidden[part])
        return of_hidden, of_weight, None, None


def measured(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p_label, lse and H of each row of logits, in float32."""
    z = logits.float() / temperature
    highest = z.amax(-1, keepdim=True)
    weights = torch.exp(z - highest)
    total = weights.sum(-1)
    lse = highest[:, 0] + total.log()
    entropy = lse - (weights * z).sum(-1) / total
    return z.gather(-1, labels[:, None])[:, 0] - lse, lse, entropy


def differentiated(
    logits: torch.Tensor,
    known: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    upstream: tuple[torch.Tensor, torch.Tensor | None],
    temperature: float,
) -> torch.Tensor:
    """The gradient of the logits, in their precision; `known` is labels, lse and H, `upstream` of log p_label and H."""
    (labels, lse, entropy), (of_log_probs, of_entropy) = known, upstream
    log_p = logits.float() / temperature - lse[:, None]
    p = log_p.exp()
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels[:, None]
    gradient = (is_label.float() - p) * of_log_probs[:, None]
    if of_entropy is not None:
        gradient = gradient - p * (log_p + entropy[:, None]) * of_entropy[:, None]
    return (gradient / temperature).to(logits.dtype)


def chunks(tokens: int, vocabulary: int) -> list[slice]:
    """Equal parts of the tokens, each with at most CHUNK_ELEMENTS logits (but at least one token)."""
    count = max(1, -(-tokens * vocabulary // CHUNK_ELEMENTS))
    size = max(1, -(-tokens // count))
    return [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]


def _on(tensor: torch.Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    return _compiled(function) if tensor.is_cuda else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)

"""Generation on transformers' continuous batching: the engine of the CPU solver and of the CPU rollouts.

Token ids in, token ids and their log-probabilities out. All requests in flight are generated together, each with its
own temperature, length and, optionally, a regular expression that its text must match and a seed. The log-probability
of a token is that of the distribution it was drawn from: after temperature and, for guided requests, after the mask.

The same seed, prompt, options and weights give the same tokens whatever else is generated meanwhile, as far as logits
do not depend on the batch: in another batch their last bits may differ, which turns a draw that is nearly even. That
is rare in float32; in bfloat16 one long text in a few differs.
A request with a seed has no log-probabilities, because its tokens are chosen before the sampler sees them.

GPUs do not use this file; SGLang has all of it. Heavy imports happen when an engine is made.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.token_masks import GrammarMasks, SeededDraws, attach, draw_key

GREEDY_TEMPERATURE = 1e-4  # the sampler has no greedy mode per request; at this temperature it picks the maximum
BLOCK_TOKENS = 32
LET_GO_S = 0.02  # between two looks at whether cancelled requests are gone
PREFILL_TOKENS = 512  # most tokens of one forward pass; bounds the memory of the logits


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens of one request and their log-probabilities; `finish_reason` is "stop" or "length"."""

    token_ids: list[int]
    log_probs: list[float]  # none for a request with a seed
    finish_reason: str


class GenerationError(RuntimeError):
    """The engine could not generate; the text says why."""


class GenerationEngine:
    """One model with continuous batching. Call `generate` from one event loop only."""

    def __init__(self, model: Any, tokenizer: Any, *, context_tokens: int, max_running: int) -> None:
        """`model` is a transformers causal LM in eval mode; the KV cache holds half of max_running full contexts."""
        self.model = model
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self._blocks = max(1, max_running // 2) * -(-context_tokens // BLOCK_TOKENS)
        self._masks = GrammarMasks(tokenizer, model.config.vocab_size)
        self._ids = itertools.count()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = asyncio.Event()
        self._open.set()
        self._replacing = asyncio.Lock()
        self._manager = self._start()

    @property
    def running(self) -> int:
        """Requests that are generated or wait for a place."""
        return self._running

    @property
    def failure(self) -> str | None:
        """Why the engine is dead, or None while it lives."""
        error = self._manager.fatal_error
        return None if error is None else str(error)

    async def generate(
        self,
        token_ids: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        regex: str | None = None,
        seed: int | None = None,
    ) -> Generated:
        """Generate until the end token or `max_new_tokens`; GenerationError when prompt and answer do not fit."""
        if max_new_tokens < 1 or len(token_ids) + max_new_tokens > self.context_tokens:
            raise GenerationError(
                f"{len(token_ids)} prompt tokens and {max_new_tokens} new ones exceed "
                f"the context of {self.context_tokens}"
            )
        options: dict[str, Any] = {"temperature": max(float(temperature), GREEDY_TEMPERATURE)}
        if regex is not None:
            try:
                self._masks.check(regex)  # an error in the generation thread would end it for everybody
            except ValueError as error:
                raise GenerationError(str(error)) from error
            options[GrammarMasks.option] = regex
        if seed is not None:
            options[SeededDraws.option] = draw_key(seed, token_ids)
        await self._open.wait()
        self._running += 1
        self._idle.clear()
        request_id = f"request-{next(self._ids)}"
        try:
            result = await self._submit(request_id, token_ids, max_new_tokens, options)
        finally:
            self._masks.forget(request_id)
            self._running -= 1
            if self._running == 0:
                self._idle.set()
        if result.error is not None:
            raise GenerationError(result.error)
        ended = bool(result.generated_tokens) and result.generated_tokens[-1] == self.tokenizer.eos_token_id
        log_probs = list(result.logprobs) if seed is None else []
        return Generated(list(result.generated_tokens), log_probs, "stop" if ended else "length")

    async def replace_weights(self, load: Callable[[Any], None]) -> None:
        """Finish what is running, let `load(model)` change the weights, drop the KV cache, go on.

        When `load` raises, generation goes on with whatever weights it has left behind.
        """
        async with self._replacing:
            self._open.clear()
            await self._idle.wait()
            await self._let_go()
            try:
                await asyncio.to_thread(self._manager.stop, True)
                await asyncio.to_thread(load, self.model)
            finally:
                self._manager = self._start()
                self._open.set()

    async def _let_go(self) -> None:
        """Wait until the generation thread has dropped cancelled requests: told to stop before that, it never ends."""
        manager, processor = self._manager, self._manager.batch_processor
        while processor is not None and manager.fatal_error is None:
            if manager.cancel_queue.empty() and not processor.has_pending_requests():
                return
            await asyncio.sleep(LET_GO_S)

    def stop(self) -> None:
        """Stop the generation thread."""
        self._manager.stop(block=True, timeout=5)

    async def _submit(self, request_id: str, token_ids: list[int], max_new_tokens: int, options: dict[str, Any]) -> Any:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._manager.register_result_handler(request_id, lambda r: None if done.done() else done.set_result(r))
        self._manager.add_request(
            token_ids,
            request_id=request_id,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            **options,
        )
        try:
            while not done.done():
                await asyncio.wait([done], timeout=1.0)
                # A dead worker answers nobody: look at it while waiting instead of hanging.
                if not done.done() and self._manager.fatal_error is not None:
                    raise GenerationError(f"the generation thread died: {self._manager.fatal_error}")
        except asyncio.CancelledError:
            self._manager.cancel_request(request_id)
            raise
        return done.result()

    def _start(self) -> Any:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        manager = self.model.init_continuous_batching(
            # A temperature other than 1 is what makes transformers create the per-request warper at all.
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=0.5,
                top_k=None,
                top_p=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                block_size=BLOCK_TOKENS,
                num_blocks=self._blocks,
                max_batch_tokens=PREFILL_TOKENS,
                return_logprobs=True,
                per_request_processors=True,
                use_cuda_graph=False,
            ),
        )
        attach(manager.logit_processor, self._masks)
        attach(manager.logit_processor, SeededDraws())
        manager.start()
        return manager


def load_engine(folder: str, *, dtype: str, threads: int, context_tokens: int, max_running: int) -> GenerationEngine:
    """An engine on the weights of a Hugging Face folder or id; must be called with an event loop running."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if threads:
        torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return GenerationEngine(model.eval(), tokenizer, context_tokens=context_tokens, max_running=max_running)


def load_folder(model: Any, folder: Path) -> None:
    """Copy the weights of another Hugging Face folder of the same shape into `model`; raises ValueError on a misfit."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"expected *.safetensors in {folder}, found none")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    copy_weights(model, state)


def copy_weights(model: Any, state: dict[str, Any]) -> None:
    """Copy tensors by name into `model`; every parameter that is not tied must be there. Raises ValueError."""
    import torch

    own = model.state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items() if name not in own or own[name].shape != t.shape}
    if shapes:
        raise ValueError(f"tensors that do not fit the served model: {shapes}")
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    missing = [name for name in own if name not in state and name not in tied]
    if missing:
        raise ValueError(f"tensors missing for the served model: {missing[:5]}")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)

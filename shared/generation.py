"""Generation on transformers' continuous batching: the engine of the CPU solver and of the CPU rollouts.

Token ids in, token ids and their log-probabilities out. All requests in flight are generated together, each with its
own temperature, length and, optionally, a regular expression that its text must match. The log-probability of a token
is that of the distribution it was drawn from: after temperature and, for guided requests, after the mask.

GPUs do not use this file; SGLang has all of it. Heavy imports happen when an engine is made.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GREEDY_TEMPERATURE = 1e-4  # the sampler has no greedy mode per request; at this temperature it picks the maximum
BLOCK_TOKENS = 32
PREFILL_TOKENS = 512  # most tokens of one forward pass; bounds the memory of the logits


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens of one request and their log-probabilities; `finish_reason` is "stop" or "length"."""

    token_ids: list[int]
    log_probs: list[float]
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
        self, token_ids: list[int], *, max_new_tokens: int, temperature: float, regex: str | None = None
    ) -> Generated:
        """Generate until the end token or `max_new_tokens`; GenerationError when prompt and answer do not fit."""
        if max_new_tokens < 1 or len(token_ids) + max_new_tokens > self.context_tokens:
            raise GenerationError(
                f"{len(token_ids)} prompt tokens and {max_new_tokens} new ones exceed "
                f"the context of {self.context_tokens}"
            )
        await self._open.wait()
        self._running += 1
        self._idle.clear()
        request_id = f"request-{next(self._ids)}"
        try:
            result = await self._submit(request_id, token_ids, max_new_tokens, temperature, regex)
        finally:
            self._masks.forget(request_id)
            self._running -= 1
            if self._running == 0:
                self._idle.set()
        if result.error is not None:
            raise GenerationError(result.error)
        ended = bool(result.generated_tokens) and result.generated_tokens[-1] == self.tokenizer.eos_token_id
        return Generated(list(result.generated_tokens), list(result.logprobs), "stop" if ended else "length")

    async def replace_weights(self, load: Callable[[Any], None]) -> None:
        """Finish what is running, let `load(model)` change the weights, drop the KV cache, go on.

        When `load` raises, generation goes on with whatever weights it has left behind.
        """
        async with self._replacing:
            self._open.clear()
            await self._idle.wait()
            try:
                await asyncio.to_thread(self._manager.stop, True)
                await asyncio.to_thread(load, self.model)
            finally:
                self._manager = self._start()
                self._open.set()

    def stop(self) -> None:
        """Stop the generation thread."""
        self._manager.stop(block=True, timeout=5)

    async def _submit(
        self, request_id: str, token_ids: list[int], max_new_tokens: int, temperature: float, regex: str | None
    ) -> Any:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._manager.register_result_handler(request_id, lambda r: None if done.done() else done.set_result(r))
        options: dict[str, Any] = {"temperature": max(float(temperature), GREEDY_TEMPERATURE)}
        if regex is not None:
            options["regex"] = regex
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
        self._masks.attach(manager.logit_processor)
        manager.start()
        return manager


class GrammarMasks:
    """Token masks of guided requests, as one more per-request processor of transformers' continuous batching."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiler: Any = None  # made at the first guided request: a server without any needs no xgrammar
        self._matchers: dict[str, tuple[Any, int]] = {}  # request → (matcher, tokens it has accepted)
        self._bitmask: Any = None

    def attach(self, processors: Any) -> None:
        """Put the masks behind the temperature in transformers' list of logits processors."""
        from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

        masks = self

        class MaskProcessor(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
            supported_kwargs: dict[str, type] = {"regex": str}  # noqa: RUF012
            ignored_kwargs: tuple[str, ...] = ()

            def fill_defaults(self, int32_tensor: "torch.Tensor") -> None:
                int32_tensor.fill_(0)

            def prepare_tensor_args(self, requests_in_batch: list[Any]) -> "torch.Tensor":
                return masks.rows(requests_in_batch)

            def __call__(self, scores: "torch.Tensor", tensor_arg: "torch.Tensor") -> "torch.Tensor":
                return masks.apply(scores, tensor_arg)

        processors.logits_processor.append(MaskProcessor())
        processors.tensors_required += 1
        processors.do_processing = True
        processors._retrieve_processors_kwargs()

    def forget(self, request_id: str) -> None:
        """Drop the state of a finished request."""
        self._matchers.pop(request_id, None)

    def rows(self, requests: Iterable[Any]) -> "torch.Tensor":
        """Per query token of the batch: 0, or 1 + the row of the bitmask that applies to its logits."""
        import torch

        rows: list[int] = []
        guided: list[Any] = []
        for request in requests:
            marks = [0] * request.query_length
            regex = request.state.logit_processor_kwargs.get("regex")
            if regex is not None and request.has_new_token:
                guided.append(self._advance(request.state, regex))
                marks[-1] = len(guided)
            rows.extend(marks)
        if guided:
            from xgrammar import allocate_token_bitmask

            self._bitmask = allocate_token_bitmask(len(guided), self._vocab_size)
            for index, matcher in enumerate(guided):
                matcher.fill_next_token_bitmask(self._bitmask, index)
        return torch.tensor(rows, dtype=torch.int32)

    def apply(self, scores: "torch.Tensor", marks: "torch.Tensor") -> "torch.Tensor":
        """Set the logits of forbidden tokens to -inf. scores: [tokens, vocabulary], marks: [≥ tokens]."""
        positions = marks[: scores.size(0)].nonzero().flatten().tolist()
        if positions:
            from xgrammar import apply_token_bitmask_inplace

            for position in positions:
                row = int(marks[position]) - 1
                mask = self._bitmask[row : row + 1]
                apply_token_bitmask_inplace(scores[position : position + 1], mask, backend="cpu")
        return scores

    def _grammar_compiler(self) -> Any:
        if self._compiler is None:
            from xgrammar import GrammarCompiler, TokenizerInfo

            end = [self._tokenizer.eos_token_id]
            info = TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=end)
            self._compiler = GrammarCompiler(info, max_threads=1)
        return self._compiler

    def _advance(self, state: Any, regex: str) -> Any:
        matcher, accepted = self._matchers.get(state.request_id, (None, 0))
        if matcher is None:
            from xgrammar import GrammarMatcher

            matcher = GrammarMatcher(self._grammar_compiler().compile_regex(regex))
        for token in state.generated_tokens[accepted:]:
            matcher.accept_token(token)
        self._matchers[state.request_id] = (matcher, len(state.generated_tokens))
        return matcher


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

"""Rules of single requests for the next token, as logits processors of transformers' continuous batching.

`GrammarMasks` forbids what the regular expression of a guided request does not allow. `SeededDraws` draws the token of
a request with a seed and forbids all others: the engine's own draw, whose random numbers all requests share, then has
no choice. Both see the logits after the temperature, and the draws come last. They work on logits in place and assume
what transformers does on a CPU: a batch is prepared after the batch before it is drawn.
"""

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class GrammarMasks:
    """Token masks of guided requests, whose option is `regex`."""

    option = "regex"
    kind: type = str

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiler: Any = None  # made at the first guided request: a server without any needs no xgrammar
        self._matchers: dict[str, tuple[Any, int]] = {}  # request → (matcher, tokens it has accepted)
        self._bitmask: Any = None

    def check(self, regex: str) -> None:
        """Raise ValueError for an expression that cannot be compiled; one that can is compiled then."""
        try:
            self._grammar_compiler().compile_regex(regex)
        except RuntimeError as error:
            raise ValueError(f"expected a regular expression that xgrammar reads, found {regex!r} ({error})") from error

    def forget(self, request_id: str) -> None:
        """Drop the state of a finished request."""
        self._matchers.pop(request_id, None)

    def prepare(self, states: list[Any]) -> None:
        """Fill one row of the bitmask per request."""
        if states:
            from xgrammar import allocate_token_bitmask

            self._bitmask = allocate_token_bitmask(len(states), self._vocab_size)
            for row, state in enumerate(states):
                self._advance(state).fill_next_token_bitmask(self._bitmask, row)

    def apply(self, scores: "torch.Tensor", row: int) -> None:
        """Set the logits of forbidden tokens to -inf. scores: [1, vocabulary]."""
        from xgrammar import apply_token_bitmask_inplace

        apply_token_bitmask_inplace(scores, self._bitmask[row : row + 1], backend="cpu")

    def _grammar_compiler(self) -> Any:
        if self._compiler is None:
            from xgrammar import GrammarCompiler, TokenizerInfo

            end = [self._tokenizer.eos_token_id]
            info = TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=end)
            self._compiler = GrammarCompiler(info, max_threads=1)
        return self._compiler

    def _advance(self, state: Any) -> Any:
        matcher, accepted = self._matchers.get(state.request_id, (None, 0))
        if matcher is None:
            from xgrammar import GrammarMatcher

            regex = state.logit_processor_kwargs[self.option]
            matcher = GrammarMatcher(self._grammar_compiler().compile_regex(regex))
        tokens = drawn_tokens(state)
        for token in tokens[accepted:]:
            matcher.accept_token(token)
        self._matchers[state.request_id] = (matcher, len(tokens))
        return matcher


class SeededDraws:
    """Draws of requests with a seed, whose option is the `draw_key` of seed and prompt."""

    option = "draw_key"
    kind: type = bytes

    def __init__(self) -> None:
        self._places: list[tuple[bytes, int]] = []  # (key, tokens drawn so far)

    def prepare(self, states: list[Any]) -> None:
        """Note which token of which request comes next."""
        self._places = [(state.logit_processor_kwargs[self.option], len(drawn_tokens(state))) for state in states]

    def apply(self, scores: "torch.Tensor", row: int) -> None:
        """Leave one token possible. scores: [1, vocabulary]."""
        token = draw(scores[0], *self._places[row])
        scores.fill_(float("-inf"))
        scores[0, token] = 0.0


def attach(processors: Any, rule: GrammarMasks | SeededDraws) -> None:
    """Put a rule at the end of transformers' list of logits processors, for the requests that have its option."""
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

    class RuleProcessor(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
        supported_kwargs: dict[str, type] = {rule.option: rule.kind}  # noqa: RUF012
        ignored_kwargs: tuple[str, ...] = ()

        def fill_defaults(self, int32_tensor: "torch.Tensor") -> None:
            int32_tensor.fill_(0)

        def prepare_tensor_args(self, requests_in_batch: list[Any]) -> "torch.Tensor":
            marks, states = marked(requests_in_batch, rule.option)
            rule.prepare(states)
            return marks

        def __call__(self, scores: "torch.Tensor", tensor_arg: "torch.Tensor") -> "torch.Tensor":
            for position in tensor_arg[: scores.size(0)].nonzero().flatten().tolist():
                rule.apply(scores[position : position + 1], int(tensor_arg[position]) - 1)
            return scores

    processors.logits_processor.append(RuleProcessor())
    processors.tensors_required += 1
    processors.do_processing = True
    processors._retrieve_processors_kwargs()


def marked(requests: Iterable[Any], option: str) -> tuple["torch.Tensor", list[Any]]:
    """Per query token of a batch 0, or 1 + the index of the request whose next token it gives; and those requests."""
    import torch

    marks: list[int] = []
    states: list[Any] = []
    for request in requests:
        marks += [0] * request.query_length
        if request.has_new_token and option in request.state.logit_processor_kwargs:
            states.append(request.state)
            marks[-1] = len(states)
    return torch.tensor(marks, dtype=torch.int32), states


def drawn_tokens(state: Any) -> list[int]:
    """All tokens drawn for a request; once it was evicted from the cache, transformers has some with the prompt."""
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    return [*state.initial_tokens[prompt:], *state.generated_tokens]


def draw_key(seed: int, token_ids: list[int]) -> bytes:
    """What the draws of a request depend on: seed and prompt, so that turns of one seed draw independently."""
    return hashlib.blake2b(repr((seed, token_ids)).encode(), digest_size=16).digest()


def draw(scores: "torch.Tensor", key: bytes, place: int) -> int:
    """A token with probability softmax(scores), the same for the same key and place. scores: [vocabulary]."""
    return int((scores + gumbel_noise(key, place, scores.size(0))).argmax())


def gumbel_noise(key: bytes, place: int, size: int) -> "torch.Tensor":
    """−log(−log u) for u uniform in [0, 1), [size] in float64: the arg max of logits + noise is a draw by softmax."""
    import torch

    seed = hashlib.blake2b(place.to_bytes(8), key=key, digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed))
    return torch.rand(size, dtype=torch.float64, generator=generator).log_().neg_().log_().neg_()

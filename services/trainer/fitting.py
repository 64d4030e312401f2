"""Prompts that fit: a seed's document is cut until its whole prompt is within `prompt_tokens`.

Lengths are those of the prompt as verl's agent loop builds it, which would cut off a longer one's start without a word.
What loads a tokenizer is for a child process, as `fit_in_children` makes them.
"""

import os
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

from services.trainer.protocol import SEARCH_TOOL, Message, proposer_messages
from services.trainer.tokens import Tokens
from services.trainer.verl_main import die_with_parent
from shared.command import UsageError
from shared.records import Seed
from shared.settings import TrainerSettings

FITTED_AT_ONCE = 1024
MOST_CHILDREN = 8  # each takes some 400 MB


@dataclass(frozen=True, slots=True)
class FittedSeed:
    """A seed whose prompt fits, the length of that prompt, and whether its document was cut for it."""

    seed: Seed
    prompt_tokens: int
    shortened: bool = False


def child_processes(count: int) -> ProcessPoolExecutor:
    """Processes for work that loads transformers, which would otherwise stay in memory for the whole run."""
    return ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=die_with_parent, initargs=(os.getpid(),)
    )


@cache
def load_tokenizer(model: str) -> Any:
    """The tokenizer as verl loads it, with a chat template. For a child process; raises UsageError."""
    from transformers import AutoTokenizer

    where = "check DRZERO_TRAINER__ACTOR__MODEL and DRZERO_SOLVER__MODEL"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"expected a tokenizer at {model}, found none ({str(error).splitlines()[0]}); {where}"
        ) from error
    if not tokenizer.chat_template:
        raise UsageError(f"expected a chat template with the tokenizer of {model}, found none; {where}")
    return tokenizer


def prompt_lengths(model: str, prompts: list[list[Message]]) -> list[int]:
    """Tokens of prompts as verl's agent loop builds them: chat template, tool schema, opening of the reply."""
    encoded = load_tokenizer(model).apply_chat_template(
        prompts, tools=[SEARCH_TOOL], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return [len(ids) for ids in encoded["input_ids"]]


def prompt_of(seed: Seed, trainer: TrainerSettings) -> list[Message]:
    """The proposer's prompt for a seed."""
    return proposer_messages(seed, trainer.prompts, trainer.worked_examples)


def fit_in_children(seeds: list[Seed], trainer: TrainerSettings, model: str) -> list[FittedSeed]:
    """`fit_prompts` in child processes: one for each batch, as far as there are processors."""
    batches = [seeds[start : start + FITTED_AT_ONCE] for start in range(0, len(seeds), FITTED_AT_ONCE)]
    with child_processes(min(len(batches), os.cpu_count() or 1, MOST_CHILDREN)) as children:
        fitted = children.map(partial(fit_prompts, trainer=trainer, model=model), batches)
        return [one for batch in fitted for one in batch]


def fit_prompts(seeds: list[Seed], *, trainer: TrainerSettings, model: str) -> list[FittedSeed]:
    """Each seed with as much of its document as fits. For a child process."""
    load_tokenizer(model)  # says what is wrong with a model before anything else meets it
    tokens = Tokens(model)
    cut = [replace(seed, document=tokens.cut(seed.document, trainer.document_tokens)) for seed in seeds]
    lengths = prompt_lengths(model, [prompt_of(seed, trainer) for seed in cut])
    return [
        FittedSeed(seed, length) if length <= trainer.prompt_tokens else shorten(seed, trainer, model)
        for seed, length in zip(cut, lengths, strict=True)
    ]


def shorten(seed: Seed, trainer: TrainerSettings, model: str) -> FittedSeed:
    """The seed with the longest beginning of its document that fits; raises UsageError when nothing of it does."""
    tokens = Tokens(model)

    def beginning(size: int) -> Seed:
        return replace(seed, document=tokens.cut(seed.document, size))

    def length(size: int) -> int:
        return prompt_lengths(model, [prompt_of(beginning(size), trainer)])[0]

    size = longest_fit(tokens.count(seed.document), lambda size: length(size) <= trainer.prompt_tokens)
    if size < 1:
        raise UsageError(
            f"expected prompts of at most DRZERO_TRAINER__PROMPT_TOKENS = {trainer.prompt_tokens} tokens, but the one "
            f"for PMID {seed.pmid} with {seed.hop} hops has {length(0)} without any document; raise that setting or "
            "lower DRZERO_TRAINER__WORKED_EXAMPLES"
        )
    return FittedSeed(beginning(size), length(size), shortened=True)


def longest_fit(most: int, fits: Callable[[int], bool]) -> int:
    """The largest size in 0 … `most` that fits, by halving; −1 when not even 0 does."""
    return bisect_left(range(most + 1), True, key=lambda size: not fits(size)) - 1

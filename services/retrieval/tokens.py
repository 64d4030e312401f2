"""Texts → token ids → batches of a shape that the processors like; nothing here loads torch.

In: texts and a tokenizer of the package `tokenizers` with truncation on. Out: ids of each text, rows of each forward
pass and padded arrays. Where batches hold texts of one padded length only (a multiple of STEP), a text's neighbours
do not change the shape it is computed in.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.retrieval.ahead import ahead

Tokens = npt.NDArray[np.int64]  # ids of one text, or of a batch

TOKENIZER = "tokenizer.json"
STEP = 4  # lengths are padded to the next multiple
# Texts that are tokenised and sorted by length together. The first windows are small, so that the device starts early;
# longer ones than the last hardly save more padding.
FIRST_WINDOW, LAST_WINDOW = 512, 4096


def write_tokenizer(tokenizer: Any, padding: int, folder: Path) -> None:
    """Keep a tokenizer with its truncation and padding id beside a converted model."""
    tokenizer.enable_padding(pad_id=padding)
    tokenizer.save(str(folder / TOKENIZER))
    tokenizer.no_padding()


def read_tokenizer(folder: Path) -> tuple[Any, int]:
    """What `write_tokenizer` kept."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    padding = int(tokenizer.padding["pad_id"])
    tokenizer.no_padding()
    return tokenizer, padding


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """The token ids of each text, cut to the tokenizer's length; on all cores, with Python's lock released."""
    return [np.array(found.ids, dtype=np.int64) for found in tokenizer.encode_batch_fast(list(texts))]


def tokenised(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[int, list[Tokens]]]:
    """(first row, token ids) of each window of the texts; the next is made in a thread while one is used."""
    parts = list(windows(texts))
    made = (tokenise(tokenizer, part) for part in parts)
    first = 0
    for tokens in ahead(made) if len(parts) > 1 else made:
        yield first, tokens
        first += len(tokens)


def windows(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, in pieces that double from FIRST_WINDOW to LAST_WINDOW."""
    start, size = 0, FIRST_WINDOW
    while start < len(texts):
        yield texts[start : start + size]
        start, size = start + size, min(2 * size, LAST_WINDOW)


def padded_length(length: int) -> int:
    """The next multiple of STEP, at least one."""
    return max(1, -(-length // STEP)) * STEP


def batches_of_one_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of one padded length and at most `tokens` tokens, but at least a row, longest first."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(padded_length(length), []).append(row)
    for length in sorted(groups, reverse=True):
        size = max(1, tokens // length)
        rows = groups[length]
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def batches_by_tokens(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `tokens` tokens with padding, but at least one row, longest texts first."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(rows):
        size = max(1, tokens // max(1, lengths[rows[start]]))
        yield rows[start : start + size]
        start += size


def padded(tokens: Sequence[Tokens], padding: int, length: int) -> tuple[Tokens, Tokens]:
    """Ids of a batch and its mask of 0 and 1, both of shape [n, length]."""
    ids = np.full((len(tokens), length), padding, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, found in enumerate(tokens):
        ids[row, : len(found)] = found
        mask[row, : len(found)] = 1
    return ids, mask

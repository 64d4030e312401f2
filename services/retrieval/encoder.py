"""The one text encoder: index and queries go through the same object, so both sides are pooled alike.

In: texts. Out: float32 vectors of length 1, shape [n, dim]. Weights are read from safetensors only and no code of a
model repository is ever run. torch and transformers are imported when an encoder is made, not before. An encoder sets
torch's thread count for the process and belongs to the thread that made it.

Many texts go through in windows: while a window is on the device, a thread tokenises the next. On a GPU a batch is as
many texts as fit a number of tokens, nothing waits for the card within a window, and vectors are copied once a window.
"""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from services.retrieval.ahead import ahead
from shared.files import ArtifactError, hash_file, hash_json
from shared.model_files import resolve_model
from shared.settings import EncoderSettings, Settings

if TYPE_CHECKING:
    import torch

Vectors = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]  # ids of one text, or of a batch

# Texts that are tokenised and sorted by length together. The first windows are small, so that the device starts early;
# longer ones than the last hardly save more padding.
FIRST_WINDOW, LAST_WINDOW = 512, 4096

# Files of a model folder that decide what a text becomes; a README or an ONNX copy does not.
CONTENT_FILE = re.compile(r".*\.(safetensors|json|txt|model)$")


@dataclass(frozen=True)
class EncoderIdentity:
    """What a vector depends on. Two encoders with equal identities give vectors that may be compared."""

    model: str
    weights: str
    pooling: str
    max_tokens: int
    dtype: str

    def as_settings(self) -> dict[str, Any]:
        """The part that a user sets, for the index manifest."""
        return {key: value for key, value in asdict(self).items() if key != "weights"}


def identify(settings: Settings) -> EncoderIdentity:
    """The identity of the encoder that `settings` describe, without loading torch or the weights."""
    encoder = settings.retrieval.encoder
    return EncoderIdentity(
        model=encoder.model,
        weights=weights_hash(resolve_model(encoder.model, settings)),
        pooling=encoder.pooling,
        max_tokens=encoder.max_tokens,
        dtype=encoder.dtype,
    )


def weights_hash(reference: str) -> str:
    """sha256 over a model folder's files, or `commit:<hash>` of a Hugging Face id (cached or from the hub)."""
    folder = Path(reference)
    if folder.is_dir():
        files = {p.name: hash_file(p) for p in sorted(folder.iterdir()) if CONTENT_FILE.match(p.name)}
        if not any(name.endswith(".safetensors") for name in files):
            raise ArtifactError(f"expected weights as *.safetensors in {folder}, found none; convert the model first")
        return hash_json(files)
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(reference, "config.json")
    except (OSError, ValueError) as error:  # every error of the hub's client is one of the two
        raise ArtifactError(_not_loadable(reference, error)) from error
    return f"commit:{Path(config).parent.name}"


class Encoder:
    """A transformers encoder with one pooling. Not thread-safe."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # loading takes a second; its bar would break JSON logs
        encoder: EncoderSettings = settings.retrieval.encoder
        self._settings = settings
        self.batch_size = encoder.batch_size
        self._pooling, self._max_tokens = encoder.pooling, encoder.max_tokens
        if encoder.threads:
            torch.set_num_threads(encoder.threads)
        self._device = choose_device(encoder.device)
        # torch's number of the GPU this encoder computes on; None on the CPU.
        self.card: int | None = (self._device.index or 0) if self._device.type == "cuda" else None
        reference = resolve_model(encoder.model, settings)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(
                reference, dtype=getattr(torch, encoder.dtype), use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ArtifactError(_not_loadable(reference, error)) from error
        self._model = model.to(self._device).eval()
        self._padding: int = tokenizer.pad_token_id or 0  # hidden by the mask
        self._tokenizer = _rust_tokenizer(tokenizer, reference, self._max_tokens)
        self.dim: int = model.config.hidden_size

    @cached_property
    def identity(self) -> EncoderIdentity:
        """What this encoder's vectors depend on; hashing the weights takes a moment, so it is done when asked."""
        return identify(self._settings)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length 1, row i for text i, shape [len(texts), dim]."""
        import torch

        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        parts = list(windows(texts))
        tokenised = map(self.tokenise, parts)
        waiting: deque[Window] = deque()
        first = 0
        with torch.inference_mode():
            for tokens in ahead(tokenised) if len(parts) > 1 else tokenised:
                waiting.append(self.launch(tokens, first))
                first += len(tokens)
                if len(waiting) > 1:  # the card has the next window, so waiting for the last one leaves it busy
                    waiting.popleft().collect(vectors)
        while waiting:
            waiting.popleft().collect(vectors)
        return vectors

    def tokenise(self, texts: Sequence[str]) -> list[Tokens]:
        """The token ids of each text, cut to max_tokens; on all cores, with Python's lock released."""
        return [np.array(found.ids, dtype=np.int64) for found in self._tokenizer.encode_batch_fast(list(texts))]

    def launch(self, tokens: Sequence[Tokens], first: int) -> "Window":
        """Start one window, whose first text is row `first`; on a GPU without waiting for any result."""
        import torch

        found = torch.empty((len(tokens), self.dim), dtype=torch.float32, device=self._device)
        rows: list[int] = []
        for batch in self.batches([len(ids) for ids in tokens]):
            place = slice(len(rows), len(rows) + len(batch))
            found[place] = self._forward([tokens[row] for row in batch])
            rows += batch
        # To the CPU this is a copy into pinned memory that runs behind the kernels above; on a CPU it is none.
        copied = found.to("cpu", non_blocking=True)
        return Window(
            np.array(rows) + first,
            copied,
            torch.cuda.current_stream(self._device).record_event() if self.card is not None else None,
        )

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows of each forward pass for texts of these lengths in tokens."""
        if self.card is not None:
            return batches_by_tokens(lengths, self.batch_size * self._max_tokens)
        return batches_by_length(lengths, self.batch_size)

    def _forward(self, tokens: Sequence[Tokens]) -> "torch.Tensor":
        """Vectors of length 1 of one batch, shape [len(tokens), dim], on the device."""
        import torch

        ids, mask = padded(tokens, self._padding)
        given = {"input_ids": self._upload(ids)}
        if mask is not None:  # without one, attention takes its fastest kernel
            given["attention_mask"] = self._upload(mask)
        hidden = self._model(**given).last_hidden_state
        return torch.nn.functional.normalize(pool(hidden, given.get("attention_mask"), self._pooling), dim=-1)

    def _upload(self, array: Tokens) -> "torch.Tensor":
        import torch

        tensor = torch.from_numpy(array)
        # Only from pinned memory does a copy not wait for what the card is doing.
        return tensor.pin_memory().to(self._device, non_blocking=True) if self.card is not None else tensor


@dataclass(frozen=True)
class Window:
    """Vectors that the device is computing, and the rows they belong to."""

    rows: npt.NDArray[np.int64]
    found: "torch.Tensor"
    done: "torch.cuda.Event | None"

    def collect(self, vectors: Vectors) -> None:
        """Wait for the device and put every vector into its row."""
        if self.done is not None:
            self.done.synchronize()
        vectors[self.rows] = self.found.numpy()


def choose_device(wanted: str) -> "torch.device":
    """The device of a setting; `auto` is the first GPU when there is one. ArtifactError for a GPU that is absent."""
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ArtifactError(f"retrieval.encoder.device is {wanted!r}: expected auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArtifactError(
            f"retrieval.encoder.device is {wanted!r}, but torch sees {torch.cuda.device_count()} GPUs; use auto or cpu"
        )
    return device


def windows(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, in pieces that double from FIRST_WINDOW to LAST_WINDOW."""
    start, size = 0, FIRST_WINDOW
    while start < len(texts):
        yield texts[start : start + size]
        start, size = start + size, min(2 * size, LAST_WINDOW)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Row numbers by length, so that little of a batch of neighbours is padding."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `size`, longest texts first."""
    rows = longest_first(lengths)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def batches_by_tokens(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `tokens` tokens with padding, but at least one row, longest texts first."""
    rows = longest_first(lengths)
    start = 0
    while start < len(rows):
        size = max(1, tokens // max(1, lengths[rows[start]]))
        yield rows[start : start + size]
        start += size


def padded(tokens: Sequence[Tokens], padding: int) -> tuple[Tokens, Tokens | None]:
    """Ids of a batch, longest text first, shape [n, longest], and its mask of 0 and 1; None when nothing is padding."""
    ids = np.full((len(tokens), len(tokens[0])), padding, dtype=np.int64)
    for row, found in zip(ids, tokens, strict=True):
        row[: len(found)] = found
    lengths = np.array([len(found) for found in tokens])
    if lengths.min() == ids.shape[1]:
        return ids, None
    return ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)


def pool(hidden: "torch.Tensor", mask: "torch.Tensor | None", pooling: str) -> "torch.Tensor":
    """One float32 vector per text: [n, tokens, dim] and mask [n, tokens] (None: no padding) → [n, dim].

    `mean` averages the tokens that are not padding; `cls` takes the first. Sums are made in float32 at any precision.
    """
    import torch

    if pooling == "cls":
        return hidden[:, 0].float()
    if mask is None:
        return hidden.mean(dim=1, dtype=torch.float32)
    total = (hidden * mask.unsqueeze(-1)).sum(dim=1, dtype=torch.float32)
    return total / mask.sum(dim=1, keepdim=True)


def _rust_tokenizer(tokenizer: Any, reference: str, max_tokens: int) -> Any:
    """The tokenizer behind transformers' own, which makes Python lists of what nobody reads at half the speed."""
    if not tokenizer.is_fast:
        raise ArtifactError(
            f"expected an encoder at {reference!r} with a tokenizer of the package tokenizers, found "
            f"{type(tokenizer).__name__}; use a model that has a tokenizer.json or vocab.txt"
        )
    rust = tokenizer.backend_tokenizer
    rust.enable_truncation(max_tokens, direction=tokenizer.truncation_side)
    rust.no_padding()
    return rust


def _not_loadable(reference: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"expected an encoder with safetensors weights at {reference!r}, could not load it ({reason}); "
        "set DRZERO_RETRIEVAL__ENCODER__MODEL to a folder or to a model in the Hugging Face cache"
    )

"""The encoder on torch, on a GPU or a CPU. It sets torch's thread count for the process.

Many texts go through in windows: while a window is on the device, a thread tokenises the next. On a GPU a batch is as
many texts as fit a number of tokens, nothing waits for the card within a window, and vectors are copied once a window.
On a CPU a batch holds texts of one padded length that stay in the processor's cache; a text's neighbours change its
vector by rounding only (2e-7), because the kernels choose their order of summation by the number of rows.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from services.retrieval.cores import cores
from services.retrieval.encoder import Begun, Encoder, Vectors, not_loadable
from services.retrieval.tokens import (
    Tokens,
    batches_by_tokens,
    batches_of_one_length,
    padded,
    padded_length,
    tokenised,
)
from shared.files import ArtifactError
from shared.hardware import cpu_dtype
from shared.model_files import resolve_model
from shared.settings import Settings

if TYPE_CHECKING:
    import torch

CPU_TOKENS = 2048  # of a forward pass; batches of 64 abstracts leave the cache and take twice the time


class TorchEncoder(Encoder):
    """`dtype` is a precision by torch's name, or `auto`: bfloat16 where the device multiplies in it, else float32."""

    def __init__(self, settings: Settings, dtype: str) -> None:
        import torch

        encoder = settings.retrieval.encoder
        self.batch_size = encoder.batch_size
        self._pooling = encoder.pooling
        torch.set_num_threads(cores(encoder.threads))
        self._device = choose_device(encoder.device)
        self.card = (self._device.index or 0) if self._device.type == "cuda" else None
        most = encoder.batch_size * encoder.max_tokens
        self._batch_tokens = most if self.card is not None else min(most, CPU_TOKENS)
        reference = resolve_model(encoder.model, settings)
        self.tokenizer, self._padding = load_tokenizer(reference, encoder.max_tokens)
        self._model = load_model(reference, precision(dtype, self._device)).to(self._device)
        self.dim: int = self._model.config.hidden_size

    def encode(self, texts: Sequence[str], begun: Begun | None = None) -> Vectors:
        """Vectors of length 1, row i for text i, shape [len(texts), dim]."""
        import torch

        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        waiting: deque[Window] = deque()
        with torch.inference_mode():
            for first, tokens in tokenised(self.tokenizer, texts):
                waiting.append(self.launch(tokens, first))
                if len(waiting) > 1:  # the card has the next window, so waiting for the last one leaves it busy
                    waiting.popleft().collect(vectors)
        while waiting:
            waiting.popleft().collect(vectors)
        return vectors

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
            np.array(rows, dtype=np.int64) + first,
            copied,
            torch.cuda.current_stream(self._device).record_event() if self.card is not None else None,
        )

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows of each forward pass for texts of these lengths in tokens."""
        chosen = batches_of_one_length if self.card is None else batches_by_tokens
        return chosen(lengths, self._batch_tokens)

    def _forward(self, tokens: Sequence[Tokens]) -> "torch.Tensor":
        """Vectors of length 1 of one batch, shape [len(tokens), dim], on the device."""
        import torch

        longest = max(map(len, tokens))
        ids, mask = padded(tokens, self._padding, padded_length(longest) if self.card is None else longest)
        given = {"input_ids": self._upload(ids)}
        if not mask.all():  # without one, attention takes its fastest kernel
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


def precision(dtype: str, device: "torch.device") -> str:
    """`auto` → bfloat16 where the device multiplies in it, else float32."""
    if dtype != "auto" or device.type == "cpu":
        return cpu_dtype(dtype)
    import torch

    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"


def load_model(reference: str, dtype: str) -> Any:
    """The transformer itself, ready to compute; ArtifactError when there is none with safetensors."""
    import torch
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # loading takes a second; its bar would break JSON logs
    try:
        model = AutoModel.from_pretrained(
            reference, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ArtifactError(not_loadable(reference, error)) from error
    return model.eval()


def load_tokenizer(reference: str, max_tokens: int) -> tuple[Any, int]:
    """A model's tokenizer with truncation on, and its padding id.

    It is the one behind transformers' own, which makes Python lists of what nobody reads at half the speed.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(not_loadable(reference, error)) from error
    if not tokenizer.is_fast:
        raise ArtifactError(
            f"expected an encoder at {reference!r} with a tokenizer of the package tokenizers, found "
            f"{type(tokenizer).__name__}; use a model that has a tokenizer.json or vocab.txt"
        )
    rust = tokenizer.backend_tokenizer
    rust.enable_truncation(max_tokens, direction=tokenizer.truncation_side)
    rust.no_padding()
    return rust, tokenizer.pad_token_id or 0  # hidden by the mask


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

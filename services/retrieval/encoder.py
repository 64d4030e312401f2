"""The one text encoder: index and queries go through the same object, so both sides are pooled alike.

In: texts. Out: float32 vectors of length 1, shape [n, dim]. Weights are read from safetensors only and no code of a
model repository is ever run. torch and transformers are imported when an encoder is made, not before; this is the only
place of the service that chooses a device. An encoder sets torch's thread count for the process and belongs to the
thread that made it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shared.files import ArtifactError, hash_file, hash_json
from shared.model_files import resolve_model
from shared.settings import EncoderSettings, Settings

if TYPE_CHECKING:
    import torch

Vectors = npt.NDArray[np.float32]

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
        reference = resolve_model(encoder.model, settings)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(
                reference, dtype=getattr(torch, encoder.dtype), use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ArtifactError(_not_loadable(reference, error)) from error
        self._model = model.to(self._device).eval()
        self.dim: int = model.config.hidden_size

    @cached_property
    def identity(self) -> EncoderIdentity:
        """What this encoder's vectors depend on; hashing the weights takes a moment, so it is done when asked."""
        return identify(self._settings)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length 1, row i for text i, shape [len(texts), dim]."""
        import torch

        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        if not texts:
            return vectors
        # verbose=False: the tokenizer would warn about each long text, and here cutting is the intent.
        tokens = self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens, verbose=False)["input_ids"]
        with torch.inference_mode():
            for rows in batches_by_length([len(ids) for ids in tokens], self.batch_size):
                batch = self._tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")
                batch = batch.to(self._device)
                hidden = self._model(**batch).last_hidden_state
                pooled = pool(hidden, batch["attention_mask"], self._pooling)
                vectors[rows] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return vectors


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


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `size`, longest texts first, so that little of a batch is padding."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def pool(hidden: "torch.Tensor", mask: "torch.Tensor", pooling: str) -> "torch.Tensor":
    """One float32 vector per text: [n, tokens, dim] and mask [n, tokens] → [n, dim].

    `mean` averages the tokens that are not padding; `cls` takes the first. Sums are made in float32 at any precision.
    """
    if pooling == "cls":
        return hidden[:, 0].float()
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


def _not_loadable(reference: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"expected an encoder with safetensors weights at {reference!r}, could not load it ({reason}); "
        "set DRZERO_RETRIEVAL__ENCODER__MODEL to a folder or to a model in the Hugging Face cache"
    )

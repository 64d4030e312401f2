"""Texts → float32 vectors of length 1, shape [n, dim]: what an encoder is, what it depends on, and which one is opened.

Index and queries use the same weights, pooling and cut, each in a precision of its own: queries in float32, unless the
settings say otherwise, so that every machine finds the same. Two runtimes give the same vectors: torch
(`torch_encoder`, on a GPU or a CPU) and OpenVINO (`openvino_encoder`, on a CPU), which opens a converted graph that
lies in the index and never loads torch. Weights are read from safetensors only and no code of a model repository is
ever run. Heavy packages are imported when an encoder is opened, not before.
"""

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import structlog

from shared.files import ArtifactError, hash_file, hash_json
from shared.hardware import gpus
from shared.model_files import resolve_model
from shared.settings import EncoderSettings, Settings

Vectors = npt.NDArray[np.float32]
Runtime = Literal["torch", "openvino"]
Begun = Callable[[], object]

GRAPH = "encoder.xml"  # in a folder that has one, OpenVINO encodes; made by `openvino_encoder.convert`
# Files of a model folder that decide what a text becomes; a README or an ONNX copy does not.
CONTENT_FILE = re.compile(r".*\.(safetensors|json|txt|model)$")


@dataclass(frozen=True)
class EncoderIdentity:
    """What a vector depends on. Two encoders with equal identities give vectors that may be compared.

    `dtype` is as set: what `auto` means on a machine, and the runtime, change a vector by less than its use can tell.
    """

    model: str
    weights: str
    pooling: str
    max_tokens: int
    dtype: str

    def as_settings(self) -> dict[str, Any]:
        """The part that a user sets, for the index manifest."""
        return {key: value for key, value in asdict(self).items() if key != "weights"}


class Encoder(ABC):
    """A transformers encoder with one pooling. Not thread-safe, but see `encode`."""

    dim: int  # length of a vector
    card: int | None  # torch's number of the GPU that computes; None on a CPU
    batch_size: int
    overlaps = False

    @staticmethod
    def for_queries(settings: Settings, folder: Path | None = None) -> "Encoder":
        """The encoder of queries, in their precision; `folder` is the index, whose graph is opened when it has one.

        ArtifactError: no model, a damaged graph, an absent GPU.
        """
        return _opened(settings, settings.retrieval.encoder.query_dtype, folder)

    @staticmethod
    def for_documents(settings: Settings, folder: Path | None = None) -> "Encoder":
        """The encoder of papers, in the settings' precision; `folder` as for queries."""
        return _opened(settings, settings.retrieval.encoder.dtype, folder)

    @abstractmethod
    def encode(self, texts: Sequence[str], begun: Begun | None = None) -> Vectors:
        """Vectors of length 1, row i for text i, shape [len(texts), dim].

        An encoder that `overlaps` calls `begun` when it has begun with the last of the work: from then on a second
        thread may encode further texts, on the cores that this call no longer fills.
        """


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
        raise ArtifactError(not_loadable(reference, error)) from error
    return f"commit:{Path(config).parent.name}"


def runtime_for(settings: Settings, folder: Path | None = None) -> Runtime:
    """What encodes here: as set; `auto` is OpenVINO on a CPU when `folder` holds a graph, else torch.

    ArtifactError when OpenVINO is demanded where it cannot be.
    """
    encoder = settings.retrieval.encoder
    if encoder.runtime == "openvino":
        _require_openvino(encoder)
        return "openvino"
    if encoder.runtime == "torch" or folder is None or not (folder / GRAPH).is_file() or on_gpu(encoder.device):
        return "torch"
    if not has_openvino():
        log: structlog.stdlib.BoundLogger = structlog.get_logger()
        log.warning("the index has a graph for OpenVINO, which is not installed here; torch encodes", index=str(folder))
        return "torch"
    return "openvino"


def has_openvino() -> bool:
    """Whether the package is installed; it has no build for some processors."""
    return importlib.util.find_spec("openvino") is not None


def on_gpu(device: str) -> bool:
    """Whether torch computes on a GPU for this setting; asks torch only where there is a card."""
    if device != "auto":
        return device != "cpu"
    found = gpus()
    if found is None or not found.cards:
        return False
    import torch

    return torch.cuda.is_available()


def not_loadable(reference: str, error: Exception) -> str:
    """Why an encoder cannot be loaded, and what to do."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"expected an encoder with safetensors weights at {reference!r}, could not load it ({reason}); "
        "set DRZERO_RETRIEVAL__ENCODER__MODEL to a folder or to a model in the Hugging Face cache"
    )


def _require_openvino(encoder: EncoderSettings) -> None:
    if not has_openvino():
        raise ArtifactError(
            "retrieval.encoder.runtime is 'openvino': expected the package openvino, found none; "
            "install it, or use auto or torch"
        )
    if encoder.device not in ("auto", "cpu") or encoder.dtype == "float16":
        raise ArtifactError(
            "retrieval.encoder.runtime is 'openvino': expected device auto or cpu and dtype auto, float32 or "
            f"bfloat16, found {encoder.device} and {encoder.dtype}; change them, or use runtime auto or torch"
        )


def _opened(settings: Settings, dtype: str, folder: Path | None) -> Encoder:
    if runtime_for(settings, folder) == "torch":
        from services.retrieval.torch_encoder import TorchEncoder

        return TorchEncoder(settings, dtype)
    from services.retrieval.openvino_encoder import open_graph

    return open_graph(settings, dtype, folder)

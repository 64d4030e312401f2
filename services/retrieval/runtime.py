"""Which runtime embeds a corpus, decided by measuring on some of its papers, before it is embedded.

In: settings, the corpus and the build's working folder. Out: a decision, which is kept in the folder so that a build
that goes on does not measure again, and, where OpenVINO is chosen, its graph in the same folder, to be published with
the index. `auto` measures on a CPU when both runtimes can do what is asked. It does not where an earlier index of the
same encoder has a graph, which is taken over, nor for a small corpus, which torch embeds sooner than a model is
converted.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from services.retrieval.encoder import GRAPH, Encoder, has_openvino, on_gpu
from services.retrieval.recipe import damaged_file
from shared.corpus import Corpus
from shared.files import read_manifest, write_atomically
from shared.hardware import memory_gb
from shared.model_files import resolve_model
from shared.settings import Settings

NOTE = "runtime.json"
MEASURE_FROM = 256  # papers
SAMPLE = 16  # papers
ROUNDS, LIMIT_S = 6, 5.0  # of measuring; the best round counts, since others may have been disturbed
# Texts are sorted by length within a chunk; longer chunks hardly save more padding, and progress is told once a chunk.
CHUNK = 1024
BATCHES_PER_CHUNK_ON_GPU = 64  # the card waits at the start of a chunk, while the first texts are tokenised
RATES = {name: f"{name}_texts_per_second" for name in ("torch", "openvino")}  # in the manifest's counts
# Peak of a build in GB: for torch and its libraries, and per GB of weights without and with a conversion (measured).
BASE_GB, PER_WEIGHTS, PER_WEIGHTS_CONVERTED = 0.75, 1.2, 3.3


@dataclass(frozen=True)
class Decision:
    """What was set, papers per chunk, and texts a second of each runtime that was measured."""

    asked: str
    chunk: int
    rates: Mapping[str, int]


def decide(settings: Settings, corpus: Corpus, folder: Path, earlier: Path | None = None) -> Decision:
    """Decide once for a working folder; `Encoder.for_documents(settings, folder)` is then the chosen one.

    `earlier` is an index of the same encoder, or None.
    """
    note, encoder = folder / NOTE, settings.retrieval.encoder
    if note.is_file() and (kept := Decision(**json.loads(note.read_text(encoding="utf-8")))).asked == encoder.runtime:
        return kept
    _remove_graph(folder)  # of another decision, or half of one
    gpu = encoder.runtime != "openvino" and on_gpu(encoder.device)
    rates: Mapping[str, int] = {}
    if encoder.runtime == "openvino" or (not gpu and _both_can(settings, len(corpus))):
        if earlier is not None and (earlier / GRAPH).is_file() and not _damaged(earlier):
            rates = _taken_over(earlier, folder)
        else:
            rates = _converted(settings, corpus, folder)
    decision = Decision(encoder.runtime, encoder.batch_size * BATCHES_PER_CHUNK_ON_GPU if gpu else CHUNK, rates)
    write_atomically(note, json.dumps(asdict(decision)))
    return decision


def tell_memory(settings: Settings) -> None:
    """Log what loading the encoder takes at its peak, beside what there is; a warning when that is less."""
    encoder = settings.retrieval.encoder
    folder = Path(resolve_model(encoder.model, settings))
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    if not weights:  # of the hub, perhaps not here yet
        return
    torch_only = encoder.runtime == "torch" or on_gpu(encoder.device)
    needed = BASE_GB + weights * (PER_WEIGHTS if torch_only else PER_WEIGHTS_CONVERTED)
    available = memory_gb()[1]
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    tell = log.info if needed <= available else log.warning
    tell("memory of the encoder", needed_gb=round(needed, 2), available_gb=round(available, 2))


def measured(settings: Settings, texts: Sequence[str], folder: Path) -> dict[str, int]:
    """Texts a second of both runtimes on this machine, in turns, so that a slow moment meets them both."""
    rivals = {"torch": Encoder.for_documents(settings), "openvino": Encoder.for_documents(settings, folder)}
    for encoder in rivals.values():
        encoder.encode(texts[:2])  # the first pass sets up
    best = dict.fromkeys(rivals, float("inf"))
    began = time.monotonic()
    for turn in range(ROUNDS):
        for name, encoder in rivals.items():
            started = time.perf_counter()
            encoder.encode(texts)
            best[name] = min(best[name], time.perf_counter() - started)
        if turn and time.monotonic() - began > LIMIT_S:
            break
    return {name: round(len(texts) / seconds) for name, seconds in best.items()}


def sample(corpus: Corpus) -> list[str]:
    """Texts from all over the corpus."""
    step = max(1, len(corpus) // SAMPLE)
    return [corpus[row].text for row in range(0, len(corpus), step)][:SAMPLE]


def graph_files(folder: Path) -> list[Path]:
    """The files of the graph in a folder, to be published with the index; none where torch was chosen."""
    from services.retrieval.openvino_encoder import FILES

    return [folder / name for name in FILES] if (folder / GRAPH).is_file() else []


def _both_can(settings: Settings, papers: int) -> bool:
    encoder = settings.retrieval.encoder
    if encoder.runtime == "torch" or encoder.dtype == "float16" or papers < MEASURE_FROM:
        return False
    if not has_openvino():
        log: structlog.stdlib.BoundLogger = structlog.get_logger()
        log.info("torch encodes: openvino is not installed, or has no build for this processor")
    return has_openvino()


def _converted(settings: Settings, corpus: Corpus, folder: Path) -> Mapping[str, int]:
    """Convert the model; the rates of both runtimes unless one is set, and no graph where torch is faster."""
    from services.retrieval.openvino_encoder import convert

    convert(settings, folder)
    if settings.retrieval.encoder.runtime == "openvino":
        return {}
    rates = measured(settings, sample(corpus), folder)
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    log.info("runtimes measured", texts_per_second=rates)
    if rates["torch"] > rates["openvino"]:
        _remove_graph(folder)
    return rates


def _remove_graph(folder: Path) -> None:
    from services.retrieval.openvino_encoder import FILES

    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _damaged(earlier: Path) -> bool:
    from services.retrieval.openvino_encoder import FILES

    return damaged_file(earlier, FILES) is not None


def _taken_over(earlier: Path, folder: Path) -> Mapping[str, int]:
    """Copy the graph of an earlier index; what was measured for it."""
    from services.retrieval.openvino_encoder import FILES

    for name in FILES:
        shutil.copy2(earlier / name, folder)
    counts = read_manifest(earlier).counts
    return {name: counts[key] for name, key in RATES.items() if key in counts}

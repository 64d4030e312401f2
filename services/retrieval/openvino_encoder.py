"""The encoder on OpenVINO, on a CPU: the only file that imports openvino. Opening it needs neither torch nor network.

`convert` writes a model once, pooling and length included, as `encoder.xml` and `encoder.bin` (float32) beside its
tokenizer; all are data, no code is run. Each stream is one core that computes a small batch by itself: no barrier
between threads, and 512 tokens stay in its cache. A text is padded to the next multiple of 16 tokens and goes only with
texts of that length, so that its vector is bit for bit the same alone and in any batch.
"""

import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from services.retrieval.cores import cores
from services.retrieval.encoder import GRAPH, Begun, Encoder, Vectors
from services.retrieval.recipe import REMEDY, damaged_file
from services.retrieval.tokens import (
    TOKENIZER,
    Tokens,
    batches_of_one_length,
    padded,
    padded_length,
    read_tokenizer,
    tokenised,
    write_tokenizer,
)
from shared.files import MANIFEST, ArtifactError
from shared.hardware import cpu_dtype
from shared.model_files import resolve_model
from shared.settings import Settings

WEIGHTS = "encoder.bin"
FILES = (GRAPH, WEIGHTS, TOKENIZER)
BATCH_TOKENS = 512
OVERLAP = 2  # calls of `encode` at once
LEAST_TOKENS = 64  # fewer texts are spread over the streams in batches of at least so many tokens
HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoEncoder(Encoder):
    """The converted encoder of a folder, in float32, bfloat16 or, for `auto`, what the processor multiplies in."""

    card = None
    overlaps = True

    def __init__(self, folder: Path, dtype: str, settings: Settings) -> None:
        encoder = settings.retrieval.encoder
        self.batch_size = encoder.batch_size
        self._streams = cores(encoder.threads)
        self._tokenizer, self._padding = read_tokenizer(folder)
        self._openvino = _openvino()
        self._core = self._openvino.Core()
        # Demanded of a processor that cannot, bfloat16 would be computed with conversions, slower than float32.
        able = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.dtype = "bfloat16" if able and cpu_dtype(dtype) == "bfloat16" else "float32"
        try:
            self._graph = self._core.read_model(str(folder / GRAPH))
        except RuntimeError as error:
            raise ArtifactError(f"{folder / GRAPH} is no graph that OpenVINO can read; {REMEDY}") from error
        self.dim = int(self._graph.output(0).get_partial_shape()[1].get_length())
        self._queues = self._queues_of(self._streams)

    @cached_property
    def _alone(self) -> "SimpleQueue[Any]":
        """All cores for one text: the same bits in less time, but the weights are in memory once more."""
        return self._queues_of(1) if self._streams > 1 else self._queues

    def encode(self, texts: Sequence[str], begun: Begun | None = None) -> Vectors:
        """Vectors of length 1, row i for text i, shape [len(texts), dim]; see Encoder."""
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        queues = self._alone if len(texts) == 1 else self._queues
        queue = queues.get()
        try:
            for first, tokens in tokenised(self._tokenizer, texts):
                lengths = [len(ids) for ids in tokens]
                for rows in batches_of_one_length(lengths, batch_tokens(lengths, self._streams)):
                    given = padded([tokens[row] for row in rows], self._padding, padded_length(lengths[rows[0]]))
                    # Waits for a free stream. OpenVINO reads the inputs where they are, so they are held until then.
                    queue.start_async(list(given), (vectors, np.array(rows) + first, given), share_inputs=True)
            if begun is not None:
                begun()
            queue.wait_all()
        finally:
            queues.put(queue)
        return vectors

    def _queues_of(self, streams: int) -> "SimpleQueue[Any]":
        """Two queues of work on the same streams, so that the streams go on when one call waits for its last batch."""
        hints = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": self._streams,
            "INFERENCE_PRECISION_HINT": HINTS[self.dtype],
        }
        model = self._core.compile_model(self._graph, "CPU", hints)
        queues: SimpleQueue[Any] = SimpleQueue()
        for _ in range(OVERLAP):
            queue = self._openvino.AsyncInferQueue(model, streams)
            queue.set_callback(_keep)
            queues.put(queue)
        return queues


def batch_tokens(lengths: Sequence[int], streams: int) -> int:
    """Most tokens of a batch, so that every stream has one: BATCH_TOKENS, less when there are few texts."""
    share = -(-sum(map(padded_length, lengths)) // streams)
    return min(BATCH_TOKENS, max(LEAST_TOKENS, share))


def open_graph(settings: Settings, dtype: str, folder: Path | None) -> OpenVinoEncoder:
    """The encoder of the graph in `folder`, checked against its manifest; where there is none, it is made first."""
    if folder is not None and (folder / GRAPH).is_file():
        require_whole(folder)
        return OpenVinoEncoder(folder, dtype, settings)
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    log.info("converting the encoder for OpenVINO", encoder=settings.retrieval.encoder.model)
    with tempfile.TemporaryDirectory() as place:
        convert(settings, Path(place))
        return OpenVinoEncoder(Path(place), dtype, settings)


def require_whole(folder: Path) -> None:
    """ArtifactError with the file's name when a published graph is not what its manifest names."""
    if (folder / MANIFEST).is_file() and (file := damaged_file(folder, FILES)):  # a draft has no manifest
        raise ArtifactError(f"{file} does not have the content its manifest names; {REMEDY}")


def convert(settings: Settings, folder: Path) -> None:
    """Write FILES: the encoder with its pooling in float32, and its tokenizer. Loads torch and takes seconds."""
    import torch

    from services.retrieval.torch_encoder import load_model, load_tokenizer, pool

    encoder = settings.retrieval.encoder
    reference = resolve_model(encoder.model, settings)
    tokenizer, padding = load_tokenizer(reference, encoder.max_tokens)

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load_model(reference, "float32")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return torch.nn.functional.normalize(pool(hidden, attention_mask, encoder.pooling), dim=-1)

    openvino = _openvino()
    mask = torch.ones((2, 8), dtype=torch.long)  # a size of 1, or no padding at all, would be taken for a constant
    mask[1, 7] = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every shape that it takes for a constant; tests compare
        graph = openvino.convert_model(
            Pooled(),
            example_input={"input_ids": torch.ones_like(mask), "attention_mask": mask},
            input=[(name, [-1, -1], np.int64) for name in ("input_ids", "attention_mask")],
        )
    # By default weights are rounded to float16.
    openvino.save_model(graph, str(folder / GRAPH), compress_to_fp16=False)
    write_tokenizer(tokenizer, padding, folder)


def _keep(request: Any, place: tuple[Vectors, NDArray[np.int64], tuple[Tokens, Tokens]]) -> None:
    vectors, rows, _ = place
    vectors[rows] = request.get_output_tensor(0).data


def _openvino() -> Any:
    # The package reports its use to its maker unless this part of it cannot be imported; it has a stub for that case.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # how Python says "not there"
    import openvino

    return openvino

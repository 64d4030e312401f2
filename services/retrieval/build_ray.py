"""`services.retrieval.build` on several GPUs or machines, with Ray Data: `python -m services.retrieval.build_ray`.

Joins the Ray cluster of `trainer.ray_address` (none: one of this machine alone is started) and embeds chunks of the
corpus in its processes: one per GPU, or one per machine where there is none. Each keeps its chunks as the parts that a
killed build leaves, and the plain build then goes on with them, so this, too, can be killed and goes on. All machines
must see the same data folder under the same path. The package ray is in the trainer's requirements.
"""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import structlog

from services.retrieval.build import Sources, build, vectors_of
from services.retrieval.encoder import Encoder, identify, on_gpu
from services.retrieval.known import known_vectors
from services.retrieval.parts import remove_others, work_folder
from services.retrieval.recipe import corpus_folder, index_folder, recipe, same_encoder
from services.retrieval.runtime import decide
from shared.command import UsageError, run
from shared.corpus import Corpus
from shared.files import stale_reason
from shared.progress import Progress
from shared.settings import Settings


class Embedder:
    """One process of the cluster; opens corpus and encoder once and then embeds chunks."""

    def __init__(self, settings: Settings, chunk: int) -> None:
        self._chunk = chunk
        self._corpus = Corpus(corpus_folder(settings))
        target = index_folder(settings)
        wanted = recipe(self._corpus.manifest, identify(settings), settings.retrieval.index)
        parts = work_folder(target, wanted)
        self._sources = Sources(known_vectors(target, wanted), parts, Encoder.for_documents(settings, parts))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed the chunks whose numbers a batch holds."""
        for number in batch["id"].tolist():
            first = number * self._chunk
            rows = range(first, min(first + self._chunk, len(self._corpus)))
            vectors_of([self._corpus[row].text for row in rows], first, self._sources)
        return batch


def spread(settings: Settings, corpus: Corpus, chunk: int, log: structlog.stdlib.BoundLogger) -> None:
    """Embed all chunks of the corpus on the cluster."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address=settings.trainer.ray_address, include_dashboard=False, log_to_driver=False)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0)) if on_gpu(settings.retrieval.encoder.device) else 0
        processes = gpus or len([node for node in ray.nodes() if node["Alive"]])
        log.info("embedding on a Ray cluster", processes=processes, gpus=gpus, papers=len(corpus))
        count = math.ceil(len(corpus) / chunk)
        done = ray.data.range(count, override_num_blocks=count).map_batches(
            Embedder,
            fn_constructor_kwargs={"settings": settings, "chunk": chunk},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(processes, count)),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
            scheduling_strategy="SPREAD",
        )
        with Progress("index", settings, total=count, unit="chunk") as progress:
            for _ in done.iter_rows():
                progress.advance()
    finally:
        ray.shutdown()


def main(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """The command."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("expected the package ray, found none; install it, or use `services.retrieval.build`")
    absolute = settings.storage.model_copy(update={"data_dir": Path(settings.storage.data_dir).absolute()})
    settings = settings.model_copy(update={"storage": absolute})  # processes of a cluster start in other folders
    corpus = Corpus(corpus_folder(settings))
    target = index_folder(settings)
    wanted = recipe(corpus.manifest, identify(settings), settings.retrieval.index)
    if len(corpus) and stale_reason(target, settings=wanted.settings, made_from=wanted.made_from) is not None:
        parts = work_folder(target, wanted)
        remove_others(parts)
        earlier = target if same_encoder(target, wanted) else None
        spread(settings, corpus, decide(settings, corpus, parts, earlier).chunk, log)
    build(settings, log)


if __name__ == "__main__":
    raise SystemExit(run("retrieval.build_ray", main))

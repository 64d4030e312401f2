"""One Prometheus registry per process and the two ways to show it.

A name is `drzero_<service>_<what>_<unit>`, in Prometheus' customs: base units (`seconds`, `bytes`, `joules`; shares are
a `ratio` from 0 to 1), else what is counted (`queries`, `requests`, `steps`); a counter ends with `_total`, a time of
day with `_timestamp_seconds`, and what says something by its labels alone with `_info`. A number without a unit has
none (`drzero_trainer_round`). In the code a metric has the name that /metrics shows. Labels take few values: routes,
reasons, parts; never a paper, a question, a path or a message. verl's own numbers have their names as the label of
`drzero_trainer_verl`. Names of other exporters are theirs (`sglang:`, `redis_`, `DCGM_`, `container_`).

A FastAPI service mounts `metrics_text()`; nothing else is exported, so the numbers on /metrics are just the ones
a service has declared with `registry=REGISTRY`, and those of its process.
"""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

# They would double every counter, for scrapers that cannot tell when one began.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the package has not annotated it
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

# Latency buckets in seconds, from a cached search to a long generation.
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def from_zero(counter: Counter, *values: str) -> None:
    """Show a counter with one label at 0 for these values: Prometheus sees no rise in a series that begins at 1."""
    for value in values:
        counter.labels(value)


def metrics_text() -> tuple[bytes, str]:
    """Body and content type of a /metrics reply."""
    return generate_latest(REGISTRY), CONTENT_TYPE_LATEST

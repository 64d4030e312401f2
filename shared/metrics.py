"""One Prometheus registry per process and the two ways to show it.

Names are `drzero_<service>_<what>_<unit>`. A FastAPI service mounts `metrics_text()`; nothing else is exported,
so the numbers on /metrics are just the ones a service has declared with `registry=REGISTRY`.
"""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

# Latency buckets in seconds, from a cached search to a long generation.
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def metrics_text() -> tuple[bytes, str]:
    """Body and content type of a /metrics reply."""
    return generate_latest(REGISTRY), CONTENT_TYPE_LATEST

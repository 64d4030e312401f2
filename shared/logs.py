"""Structured logs: JSON lines in containers and files, readable text on a terminal.

`configure(service, settings)` is called once by each `main()`. Every line carries the service and, when
DRZERO_TRAINER__RUN names one, the run. Secrets are looked up where they are used and never passed to a logger.
"""

import logging
import sys

import structlog

from shared.settings import Settings


def configure(service: str, settings: Settings) -> structlog.stdlib.BoundLogger:
    """Set up structlog and the standard library's logging on stderr; returns the service's logger."""
    as_json = settings.log.format == "json" or (settings.log.format == "auto" and not sys.stderr.isatty())
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
        structlog.processors.format_exc_info,
    ]
    final: structlog.typing.Processor
    final = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=processors,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, final],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log.level.upper())
    for name in ("httpx", "httpcore"):  # lines per request would drown the rest, and hold what servers send back
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*processors, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(service=service, run=settings.trainer.run)
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger

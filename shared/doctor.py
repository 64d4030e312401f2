"""Checks of this machine against the settings: `python -m shared.doctor [--ports-free]`.

In: the settings. Out: one line per check on stdout, `ok|warn|FAIL name: found; expected or what to do`. A `warn` may
cost time or comfort, a `FAIL` stops the run. Exit status: 0 no FAIL, 1 at least one, 2 wrong settings. Changes
nothing, downloads nothing and loads no model.
"""

import argparse
import errno
import os
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
import redis
import structlog

from shared.command import UsageError, run
from shared.files import ArtifactError, free_gb
from shared.gpu import cards_wanted, described, gpu_settings, machine_problems, memory_problems, planned_gb
from shared.hardware import Card, Gpus, gpus, memory_gb
from shared.model_files import PACKAGE, package_file
from shared.settings import IngestSettings, RedisSettings, Settings

PYTHON_FROM, PYTHON_BELOW = (3, 11), (3, 13)  # verl 0.9.1 ends at 3.12
# Free host memory, in GB, that a whole run of the profile takes on one machine.
MEMORY_GB = {
    "demo": 10.0,  # measured 9.8: the updating worker 4.5, other processes of verl and Ray 4, solver 0.9, search 0.4
    "a100x1": 64.0,  # a 3B model's float32 weights and Adam states between phases (36), object store (8), processes
    "a100x8": 128.0,  # nothing is offloaded; eight ranks load and save the model, eight solvers load it
    "rtx24": 32.0,  # a 1.5B model's float32 weights (6), the rollout engine's copy (3), object store (8), processes
}
PROBE_S = 3.0
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result; `advice` says what was expected or what to do and is empty when nothing is to do."""

    level: Level
    name: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4} {self.name}: {self.found}" + (f"; {self.advice}" if self.advice else "")


def check_python(version: tuple[int, int]) -> Finding:
    """Python is one that every pinned package supports."""
    found = f"{version[0]}.{version[1]}"
    if PYTHON_FROM <= version < PYTHON_BELOW:
        return Finding("ok", "python", found)
    return Finding("FAIL", "python", found, "expected 3.11 or 3.12; delete .venv and name one: make venv PYTHON=…")


def check_port(service: str, host: str, port: int, *, must_be_free: bool = False) -> Finding:
    """The service's port is free, or our own service answers on it."""
    name = f"port {port} ({service})"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                remedy = f"choose another: DRZERO_{service.upper()}__HOST or DRZERO_{service.upper()}__PORT"
                return Finding("FAIL", name, f"{host} cannot be bound ({error.strerror or error})", remedy)
        else:
            return Finding("ok", name, "free")
    other = f"or choose another: DRZERO_{service.upper()}__PORT"
    if not is_ours(service, host, port):
        return Finding("FAIL", name, "in use by another program", f"expected it free; stop what listens there {other}")
    level: Level = "FAIL" if must_be_free else "warn"
    return Finding(level, name, f"in use by our own {service}", f"stop it before a second run starts, {other}")


def is_ours(service: str, host: str, port: int) -> bool:
    """A healthy service of ours listens there: /health is fine and /metrics has the service's names."""
    address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    names = (f"drzero_{service}_", "sglang:") if service == "solver" else (f"drzero_{service}_",)
    try:
        with httpx.Client(base_url=f"http://{address}:{port}", timeout=PROBE_S, trust_env=False) as http:
            healthy = http.get("/health").status_code == 200
            metrics = http.get("/metrics").text
    except httpx.HTTPError:
        return False
    return healthy and any(name in metrics for name in names)


def check_folder(name: str, path: Path, min_free_gb: float) -> Finding:
    """The folder, or the place where it will be made, can be written and has room."""
    variable = f"DRZERO_STORAGE__{name.upper()}_DIR"
    place = path
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return Finding("FAIL", f"{name} folder", f"{place} is a file", f"expected a folder; change {variable}")
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            "FAIL", f"{name} folder", f"{place} cannot be written", f"expected that it can; or set {variable}"
        )
    free = free_gb(place)
    found = f"{free:.1f} GB free at {path}"
    if free < min_free_gb:
        remedy = f"expected {min_free_gb:.1f}; free some, set {variable} or lower DRZERO_STORAGE__MIN_FREE_GB"
        return Finding("FAIL", f"{name} folder", found, remedy)
    return Finding("ok", f"{name} folder", found)


def check_memory(profile: str, available_gb: float) -> Finding:
    """Enough free memory for a whole run of the profile; far too little fails, because the system would kill it."""
    found, wanted = f"{available_gb:.1f} GB available", MEMORY_GB.get(profile)
    if wanted is None or available_gb >= wanted:
        return Finding("ok", "memory", found)
    level: Level = "FAIL" if available_gb < wanted / 2 else "warn"
    return Finding(level, "memory", found, f"profile {profile} takes about {wanted:.0f}; close other programs")


def check_shared_memory(free: float, wanted: float) -> Finding:
    """Shared memory has room for Ray's object store."""
    if free >= wanted:
        return Finding("ok", "shared memory", f"{free:.1f} GB free in /dev/shm")
    remedy = (
        f"Ray takes {wanted:.1f} and falls back to the slower disk; enlarge it (docker run --shm-size) "
        "or lower DRZERO_TRAINER__OBJECT_STORE_GB"
    )
    return Finding("warn", "shared memory", f"{free:.1f} GB free in /dev/shm", remedy)


def check_cards(settings: Settings, found: Gpus | None) -> list[Finding]:
    """As many GPUs as the settings use, each new, idle and large enough; nothing when no setting asks for one."""
    asking = gpu_settings(settings)
    if not asking:
        return []
    wanted = max(cards_wanted(settings, service) for service in ("retrieval", "solver", "trainer"))
    problems = machine_problems(found, wanted, [f"{name}={value}" for name, value in asking.items()])
    if problems or found is None:
        return [Finding("FAIL", "gpu", problem) for problem in problems]
    used = found.cards[:wanted]
    driver = Finding("ok", "gpu driver", f"{found.driver}, CUDA {found.cuda}")
    return [driver, *(_check_idle(f"gpu {n}", card) for n, card in enumerate(used)), _check_plan(settings, used)]


def _check_idle(name: str, card: Card) -> Finding:
    if card.free_gb < 0.9 * card.memory_gb:
        return Finding("warn", name, described(card), "expected it idle; nvidia-smi lists its users")
    return Finding("ok", name, described(card))


def _check_plan(settings: Settings, used: Sequence[Card]) -> Finding:
    """What the services take of a card together, `python -m shared.memory_plan`."""
    if problems := memory_problems(settings, used):
        level: Level = "FAIL" if settings.gpu_plan == "refuse" else "warn"
        return Finding(level, "gpu memory", "; ".join(problems))
    smallest = min(card.memory_gb for card in used)
    planned = planned_gb(settings, smallest)
    if planned is None:
        return Finding("warn", "gpu memory", "no plan yet", "it needs the config.json of each model; download them")
    return Finding("ok", "gpu memory", f"{planned:.0f} of {smallest:.0f} GB planned")


def check_model(variable: str, reference: str) -> Finding:
    """The model is on this machine, or can be downloaded."""
    name = f"model {reference}"
    if reference.startswith(PACKAGE):
        try:
            package_file(reference)
        except ArtifactError as error:
            return Finding("FAIL", name, str(error), f"or change {variable}")
        return Finding("ok", name, "in its Python package")
    if Path(reference).is_dir():
        if (Path(reference) / "config.json").is_file():
            return Finding("ok", name, "a local folder")
        return Finding(
            "FAIL", name, "a folder without config.json", f"expected a Hugging Face model; change {variable}"
        )
    if not HUB_ID.fullmatch(reference):
        return Finding("FAIL", name, "no such folder", f"expected a folder or a Hugging Face id; change {variable}")
    if in_hub_cache(reference):
        return Finding("ok", name, "in the Hugging Face cache")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("FAIL", name, "not in the Hugging Face cache", "unset HF_HUB_OFFLINE to let it be downloaded")
    return Finding("warn", name, "not in the Hugging Face cache", "it will be downloaded on first use")


def in_hub_cache(model_id: str) -> bool:
    """The cache holds the model's configuration and weights; False also where huggingface_hub is not installed."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    config = try_to_load_from_cache(model_id, "config.json")
    if not isinstance(config, str):  # None: unknown; an object: known not to exist
        return False
    # An interrupted download leaves the small configuration without the weights.
    return any(path.suffix in (".safetensors", ".bin") for path in Path(config).parent.iterdir())


def check_redis(settings: RedisSettings) -> list[Finding]:
    """Redis answers where an address is set; the address is shown without its password."""
    if settings.url is None:
        return []
    limit = settings.timeout_s
    try:
        place = urlsplit(settings.url).netloc.rpartition("@")[2] or "the address"
        with redis.Redis.from_url(
            settings.url, socket_timeout=limit, socket_connect_timeout=limit, retry=None
        ) as connection:
            connection.ping()
    except ValueError as error:
        return [
            Finding("FAIL", "redis", f"wrong address ({error})", "expected redis://host:port/db in DRZERO_REDIS__URL")
        ]
    except redis.RedisError:
        remedy = "start it, or leave DRZERO_REDIS__URL empty; until then progress is only logged"
        return [Finding("warn", "redis", f"{place} does not answer within {limit:.0f} s", remedy)]
    return [Finding("ok", "redis", f"{place} answers")]


def check_source(ingest: IngestSettings) -> Finding:
    """What the settings name as the origin of the papers is there."""
    if ingest.source == "xml" or (ingest.source == "auto" and ingest.xml_dir is not None):
        return _check_xml(ingest.xml_dir)
    if ingest.source == "entrez" or (ingest.source == "auto" and ingest.query is not None):
        if not ingest.query:
            return Finding("FAIL", "papers", "Entrez without a search", "set DRZERO_INGEST__QUERY")
        if not ingest.email:
            return Finding("FAIL", "papers", "Entrez without a contact address", "set DRZERO_INGEST__EMAIL")
        return Finding("ok", "papers", f"Entrez search {ingest.query!r}")
    return Finding("ok", "papers", "the shipped demo records")


def _check_xml(folder: Path | None) -> Finding:
    remedy = "expected a folder of .xml or .xml.gz files in DRZERO_INGEST__XML_DIR"
    if folder is None:
        return Finding("FAIL", "papers", "the source is xml, but no folder is named", remedy)
    if not folder.is_dir():
        return Finding("FAIL", "papers", f"{folder} is no folder", remedy)
    if not any(path.name.endswith((".xml", ".xml.gz")) for path in folder.rglob("*")):
        return Finding("FAIL", "papers", f"no PubMed XML file in {folder}", remedy)
    return Finding("ok", "papers", f"PubMed XML in {folder}")


def examine(settings: Settings, *, ports_free: bool = False) -> list[Finding]:
    """All findings about this machine, in the order in which they are best mended."""
    places = {
        "retrieval": (settings.retrieval.host, settings.retrieval.port),
        "solver": (settings.solver.host, settings.solver.port),
        "trainer": (settings.trainer.host, settings.trainer.port),
    }
    storage = settings.storage
    findings = [
        check_python(sys.version_info[:2]),
        Finding("ok", "settings", f"profile {settings.profile}"),
        *(check_port(name, *place, must_be_free=ports_free) for name, place in places.items()),
        check_folder("data", storage.data_dir, storage.min_free_gb),
        check_folder("scratch", storage.scratch_dir, storage.min_free_gb),
        check_memory(settings.profile, memory_gb()[1]),
    ]
    shared_memory = Path("/dev/shm")  # noqa: S108
    if shared_memory.is_dir():  # Linux only; elsewhere Ray keeps its objects in files anyway
        free = shutil.disk_usage(shared_memory).free / 1e9
        findings.append(check_shared_memory(free, settings.trainer.object_store_gb))
    findings += check_cards(settings, gpus() if gpu_settings(settings) else None)
    models = {
        settings.retrieval.encoder.model: "DRZERO_RETRIEVAL__ENCODER__MODEL",
        settings.trainer.actor.model: "DRZERO_TRAINER__ACTOR__MODEL",
        settings.solver.model: "DRZERO_SOLVER__MODEL",
    }
    findings += [check_model(variable, reference) for reference, variable in models.items()]
    return [*findings, *check_redis(settings.redis), check_source(settings.ingest)]


def main(settings: Settings, _: structlog.stdlib.BoundLogger, *, ports_free: bool) -> None:
    """Print the findings; UsageError when one of them is a FAIL."""
    findings = examine(settings, ports_free=ports_free)
    for finding in findings:
        print(finding, flush=True)
    failed = [finding.name for finding in findings if finding.level == "FAIL"]
    if failed:
        raise UsageError(
            f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}; each line says what to do"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m shared.doctor", description="Check this machine for a run.")
    parser.add_argument("--ports-free", action="store_true", help="a running stack of ours is a FAIL, too")
    raise SystemExit(run("doctor", partial(main, ports_free=parser.parse_args().ports_free)))

"""The ingest command as a user runs it, for tests: a process of its own with an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(data_dir: Path, **settings: object) -> dict[str, str]:
    """The environment without this machine's settings and proxies; `xml_dir=…` is DRZERO_INGEST__XML_DIR."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DRZERO_", "NCBI_")) and "proxy" not in k.lower()}
    given = {f"DRZERO_INGEST__{name.upper()}": str(value) for name, value in settings.items()}
    places = {"DRZERO_STORAGE__DATA_DIR": str(data_dir), "DRZERO_STORAGE__SCRATCH_DIR": f"{data_dir}-scratch"}
    return kept | places | {"DRZERO_STORAGE__MIN_FREE_GB": "0"} | given


def command(*arguments: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "services.ingest", *arguments]


def ingest(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; the text of stderr is the log and the sentence of a known error."""
    return subprocess.run(command(*arguments), cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)

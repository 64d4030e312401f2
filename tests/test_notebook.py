"""The notebook: what it names exists, and a run of three rounds at the smallest size, from its first cell to its last.

The run trains the real 135M model in six trainings of one step each (a quarter of an hour on two cores), so it is
`slow`.
"""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from services.trainer.__main__ import STAGES
from services.trainer.questions import FILE, read_rows, sources
from services.trainer.run_state import read_state
from shared.files import read_manifest
from shared.settings import known_variables, profiles

ROOT = Path(__file__).parents[1]
FILE_NAME = ROOT / "notebooks" / "DrZero_Biomedical.ipynb"
NOTEBOOK = nbformat.read(FILE_NAME, as_version=4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TEXT = "\n".join(cell.source for cell in NOTEBOOK.cells)
ROUNDS = (1, 2, 3)
ROLES = ("proposer", "solver")
CELL_S = 3600  # all rounds are one cell


# ---- the file --------------------------------------------------------------------------------------------------------


def test_it_is_kept_without_outputs() -> None:
    nbformat.validate(NOTEBOOK)
    for cell in json.loads(FILE_NAME.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"], cell["metadata"]) == ([], None, {})


@pytest.mark.parametrize("source", CODE, ids=range(len(CODE)))
def test_a_cell_is_python_and_short(source: str) -> None:
    ast.parse(source)
    assert len(source.splitlines()) <= 27


def test_every_module_that_it_runs_exists_and_takes_what_it_is_given() -> None:
    modules = set(re.findall(r"-m ((?:services|shared)[a-z_.]+)", TEXT))
    assert {"services.ingest", "services.retrieval.build", "services.trainer", "services.trainer.ask"} <= modules
    for name in modules:
        place = ROOT / name.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), name
    for name, option in set(re.findall(r"-m ((?:services|shared)[a-z_.]+)[^\n]*?(--[a-z-]+)", TEXT)):
        shown = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert option in shown.stdout, f"{name} {option}"


def test_every_stage_target_script_and_variable_that_it_names_exists() -> None:
    stages = re.findall(r"--(?:from|to) (?:\d\.|\{number\}\.)?([a-z_]+)", TEXT)
    assert set(stages) <= STAGES.keys()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", "\n".join(CODE))) == {"venv", "venv-gpu"} <= targets
    assert "make serve" in TEXT
    assert "serve" in targets
    assert os.access(ROOT / "run-local.sh", os.X_OK)
    assert set(re.findall(r"DRZERO(?:_+[A-Z0-9]+)+", TEXT)) <= known_variables().keys()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("81559", "a100x1"),
        ("81920\n81920", "a100x1"),
        ("40960", "rtx24"),
        ("24564", "rtx24"),
        ("23034", "rtx24"),
        ("15360", "demo"),
        ("", "demo"),
        (None, "demo"),
    ],
)
def test_the_profile_is_one_that_fits_the_card(tmp_path: Path, shown: str | None, expected: str) -> None:
    if shown is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nprintf '{shown}\n'\n")
        tool.chmod(0o755)
    (source,) = (source for source in CODE if "def card_gib" in source)
    chosen = source[: source.index("places =")]
    script = f"import os, subprocess\nfrom pathlib import Path\n{chosen}\nprint(profile)"
    said = subprocess.run(
        [sys.executable, "-c", script], env={"PATH": f"{tmp_path}:/bin"}, capture_output=True, text=True
    )
    assert said.stdout.strip() == expected, said.stderr
    assert expected in profiles()


# ---- three rounds ----------------------------------------------------------------------------------------------------

SMALL = {
    "DRZERO_TRAINER__ITERATIONS": str(len(ROUNDS)),
    "DRZERO_TRAINER__STEPS": "1",
    "DRZERO_TRAINER__PROMPTS_PER_STEP": "2",
    "DRZERO_TRAINER__SEEDS": "4",
    "DRZERO_TRAINER__EVAL_SEEDS": "2",
    "DRZERO_TRAINER__REWARD__ATTEMPTS": "2",
    "DRZERO_TRAINER__REWARD__CONCURRENCY": "8",
    "DRZERO_TRAINER__QUESTIONS__PAPERS": "24",
    "DRZERO_TRAINER__QUESTIONS__ENOUGH": "4",
    "DRZERO_TRAINER__QUESTIONS__TRIES": "1",
    "DRZERO_TRAINER__SOLVER__EVAL_QUESTIONS": "1",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def environ(places: Path) -> dict[str, str]:
    ports = {name: free_port() for name in ("RETRIEVAL", "SOLVER", "TRAINER")}
    services = {f"DRZERO_{name}__PORT": str(port) for name, port in ports.items()}
    services |= {f"DRZERO_{name}__URL": f"http://127.0.0.1:{ports[name]}" for name in ("RETRIEVAL", "SOLVER")}
    own = {f"DRZERO_STORAGE__{name.upper()}_DIR": str(places / name) for name in ("data", "scratch")}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DRZERO_")}
    return {**kept, **services, **own, **SMALL, "DRIVE_DIR": str(places / "drive")}


@pytest.fixture(scope="module")
def ran(places: Path, environ: dict[str, str]) -> Iterator[Any]:
    """The notebook with its outputs; all that it has written goes in the end."""
    notebook = nbformat.read(FILE_NAME, as_version=4)
    folder = {"metadata": {"path": str(FILE_NAME.parent)}}
    NotebookClient(notebook, timeout=CELL_S, kernel_name="python3", resources=folder).execute(env=environ)
    yield notebook
    shutil.rmtree(places)


@pytest.fixture(scope="module")
def run(ran: Any, places: Path) -> Path:
    """The folder of the finished run."""
    return places / "data" / "runs" / "demo"


slow = pytest.mark.slow
needs_venv = pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "python").is_file(), reason="the notebook's commands need .venv: make venv"
)


@slow
@needs_venv
def test_every_stage_of_three_rounds_has_finished(run: Path) -> None:
    stages = read_state(run)
    assert list(stages) == [f"{number}.{name}" for number in ROUNDS for name in STAGES]
    assert all(stage["finished"] and stage["artifact"] for stage in stages.values())


@slow
@needs_venv
def test_every_round_starts_from_the_weights_of_the_round_before(run: Path) -> None:
    for number in ROUNDS[1:]:
        before = {role: read_manifest(run / str(number - 1) / role / "weights", verify=True) for role in ROLES}
        now = {role: read_manifest(run / str(number) / role / "training") for role in ROLES}
        assert {role: one.made_from["base_weights"] for role, one in now.items()} == {
            role: one.identity for role, one in before.items()
        }
        assert now["proposer"].made_from["solver_weights"] == before["solver"].identity
    files = [read_manifest(run / str(number) / "proposer" / "weights").files for number in ROUNDS]
    assert len({of["model.safetensors"] for of in files}) > 1  # one step of a few rollouts may teach nothing, not three


@slow
@needs_venv
def test_no_paper_is_of_two_parts_or_asked_about_in_two_rounds(run: Path) -> None:
    held_out = [pmids(run, number, "held_out.parquet") for number in ROUNDS]
    trained = [pmids(run, number, "train.parquet") for number in ROUNDS]
    asked = [pmids(run, number, FILE) for number in ROUNDS]
    assert held_out[0] == held_out[1] == held_out[2]
    for number, questions in enumerate(asked):
        others = set().union(*asked[:number], *trained[: number + 1], *held_out)
        assert questions.isdisjoint(others)
        assert trained[number].isdisjoint(held_out[0].union(*asked[:number]))
    for number in ROUNDS:
        rows = read_rows(run / str(number) / "questions" / FILE)
        kept_out = {row["pmid"] for row in rows if row["split"] == "held_out"}
        assert all(sources(row).isdisjoint(kept_out) for row in rows if row["split"] == "train")


@slow
@needs_venv
def test_the_evaluation_has_base_and_round_of_all_three(run: Path, ran: Any) -> None:
    for number in ROUNDS:
        found = json.loads((run / str(number) / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["sets"]
        assert found["kept_out"]["base"]["questions"] == found["kept_out"]["round"]["questions"] >= number
    table = output(ran, "found = json.loads", "text/markdown")
    assert re.findall(r"^\| (\d) \| kept_out \|", table, re.MULTILINE) == [str(number) for number in ROUNDS]


@slow
@needs_venv
def test_the_last_rounds_solver_is_served(run: Path, places: Path) -> None:
    note = json.loads((places / "data" / "serving.json").read_text(encoding="utf-8"))
    assert Path(note["weights"]) == (run / "3" / "solver" / "weights").resolve()


@slow
@needs_venv
def test_the_report_and_an_answer_stand_in_the_notebook(ran: Any) -> None:
    assert "What the rounds have taught the solver" in output(ran, "report.html", "text/html")
    assert "no medical advice" in output(ran, "services.trainer.ask")
    assert "PMID 990000001" in output(ran, "urllib.request")


@slow
@needs_venv
def test_what_is_kept_is_on_the_drive_without_a_link(ran: Any, places: Path) -> None:
    assert not [path for path in (places / "drive").rglob("*") if path.is_symlink()]
    assert len(list((places / "drive" / "runs").rglob("model.safetensors"))) == len(ROUNDS) * len(ROLES)


@slow
@needs_venv
def test_nothing_of_it_is_left_behind(ran: Any, places: Path) -> None:
    assert processes_of(places) == []


@slow
@needs_venv
def test_servers_end_with_the_process_that_started_them(ran: Any, environ: dict[str, str], places: Path) -> None:
    script = "setpriv --pdeathsig TERM ./run-local.sh serve & wait"
    with subprocess.Popen(["bash", "-c", script], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith("serving: search at http://127.0.0.1:")
        assert {"retrieval", "solver"} <= set(re.findall(r"-m services\.(\w+)", "\n".join(processes_of(places))))
        parent.kill()
        assert parent.stdout.read() == ""  # its end comes when the last of them has closed it
    assert processes_of(places) == []


@needs_venv
def test_without_an_index_nothing_is_served(tmp_path: Path) -> None:
    places = {f"DRZERO_STORAGE__{name}_DIR": str(tmp_path / name) for name in ("DATA", "SCRATCH")}
    ports = {f"DRZERO_{name}__PORT": str(free_port()) for name in ("RETRIEVAL", "SOLVER")}
    env = {**os.environ, **places, **ports}
    said = subprocess.run(["./run-local.sh", "serve"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (1, "")
    assert (
        f"make serve: expected an index in {tmp_path}/DATA/index, found none; python -m services.ingest" in said.stderr
    )


def test_run_local_knows_no_other_word() -> None:
    said = subprocess.run(["./run-local.sh", "stop"], cwd=ROOT, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (1, "")
    assert "expected no argument, or serve; found stop" in said.stderr


def pmids(run: Path, number: int, file: str) -> set[str]:
    rows = read_rows(run / str(number) / "proposer" / "seeds" / file)
    return {row["extra_info"]["pmid"] for row in rows}


def output(notebook: Any, part: str, kind: str = "") -> str:
    """What the cell whose source has `part` has printed, or shows as `kind`."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and part in cell.source)
    if kind:
        return next(str(one.data[kind]) for one in cell.outputs if kind in one.get("data", {}))
    return "".join(one.text for one in cell.outputs if one.output_type == "stream")


def processes_of(places: Path) -> list[str]:
    """Commands of the processes that work on these folders."""
    mark, found = str(places).encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes() and int(path.name) != os.getpid():
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has ended meanwhile, or is not ours
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])

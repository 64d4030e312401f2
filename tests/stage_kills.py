"""Kills a run at random moments: `PYTHONPATH=. python tests/stage_kills.py --small --kills 10 FOLDER`.

In: settings of the environment; FOLDER, which gets `data/` and `scratch/` with one finished round, the reference, or
has them already. Starts search and solver under supervisord on free ports. Then, stage by stage and kill by kill: takes
the stage's artifact away and what it has kept in scratch, starts `python -m services.trainer --from S --to S`, sends
SIGKILL at a drawn moment, gives the same command again, and compares with the reference. Killed is the driver with all
that it has started, the driver alone, or a service, for which the driver must wait. Some moments are drawn from the
stage's whole duration, others lie just behind the driver's lock and around the publication.
Out: a line per kill, a table, each problem; FOLDER/kills.jsonl; exit status 1 when there is a problem. The reference is
put back as it was.
--small   smaller numbers of papers, steps and questions than the profile's, for a reference made here
--kills   per stage;  --stages a,b  only these;  --seed  of the draws
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from services.trainer.__main__ import STAGES
from services.trainer.model_card import CARD
from services.trainer.paths import RunPaths
from services.trainer.questions import FILE as QUESTIONS
from services.trainer.questions import read_rows
from services.trainer.records import read_lines
from services.trainer.rounds import paths_of
from services.trainer.run_state import BEAT_S, read_state
from shared.files import MANIFEST, ArtifactError, Manifest, read_manifest
from shared.settings import Settings, build_settings

ROOT = Path(__file__).parents[1]
SMALL = {
    "DRZERO_TRAINER__STEPS": "2",
    "DRZERO_TRAINER__SEEDS": "8",
    "DRZERO_TRAINER__EVAL_SEEDS": "2",
    "DRZERO_TRAINER__PROMPTS_PER_STEP": "2",
    "DRZERO_TRAINER__ROLLOUTS_PER_PROMPT": "2",
    "DRZERO_TRAINER__REWARD__ATTEMPTS": "2",
    "DRZERO_TRAINER__REWARD__CONCURRENCY": "8",
    "DRZERO_TRAINER__QUESTIONS__PAPERS": "10",
    "DRZERO_TRAINER__QUESTIONS__ENOUGH": "0",
    "DRZERO_TRAINER__QUESTIONS__TRIES": "1",
    "DRZERO_TRAINER__QUESTIONS__HELD_OUT_SHARE": "0.3",
    "DRZERO_TRAINER__SOLVER__STEPS": "2",
    "DRZERO_TRAINER__SOLVER__EVAL_QUESTIONS": "1",
    "DRZERO_TRAINER__EVALUATION__CONCURRENCY": "2",
}
# What a stage keeps in scratch: it goes with the artifact, or the stage would have nothing left to do.
KEPT: dict[str, Callable[[RunPaths], Path]] = {
    "train": lambda paths: paths.work,
    "solver_train": lambda paths: paths.work,
    "questions": lambda paths: paths.candidates,
    "evaluate": lambda paths: paths.work.parents[1] / "exams",
}
# The same inputs need not give the same bytes: these ask or train models, whose batches depend on who comes when.
SAMPLING = frozenset({"train", "questions", "solver_train", "evaluate"})
VARYING = ("invalid", "refused_batches")  # counts of a training that depend on what its services met
SERVICES = ("solver", "retrieval")
MARK = "STAGE_KILLS"  # variable by which a process is known as ours
NEAR_S = 0.1  # how far from a publication a moment near it lies
AT_ONCE_S = 0.01
POLL_S = 0.0005
STAGE_S, START_S, END_S = 1800.0, 300.0, 30.0
TEMPORARY = re.compile(r"\..+\.(building|link|new|\d+)$")


@dataclass(frozen=True, slots=True)
class Kill:
    """Who is killed, and when: so many seconds after an event."""

    target: str  # tree, driver, solver, retrieval
    after: str  # lock, draft, manifest, link
    delay_s: float


@dataclass(slots=True)
class Outcome:
    """What a kill has led to."""

    stage: str
    kill: Kill
    killed_at_s: float | None = None  # after the lock; None: the stage was over before
    resumed_s: float = 0.0
    same_bytes: bool = False
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class World:
    """The run that is killed."""

    folder: Path
    environ: Mapping[str, str]
    settings: Settings

    @property
    def run(self) -> Path:
        """The run's folder in data."""
        return paths_of(self.settings, 1, "proposer").run

    @property
    def lock(self) -> Path:
        """Made by a driver when it has started."""
        return self.run / ".driver.lock"

    @property
    def note(self) -> Path:
        """Which weights the solver serves."""
        return self.folder / "data" / "serving.json"

    def paths(self, stage: str) -> RunPaths:
        """The paths of a stage's role."""
        return paths_of(self.settings, 1, STAGES[stage].role)

    def artifact(self, stage: str) -> Path:
        """What a stage leaves."""
        return STAGES[stage].artifact(self.paths(stage))


def main(given: argparse.Namespace) -> int:
    """Make the reference where there is none, kill, and tell."""
    world = world_at(given.folder.absolute(), small=given.small)
    rng = Random(given.seed)  # noqa: S311
    outcomes = []
    with reference(world), (world.folder / "kills.jsonl").open("a", encoding="utf-8") as log:
        stages = read_state(world.run)
        for stage in given.stages:
            for kill in drawn(stage, given.kills, stages[f"1.{stage}"]["seconds"], rng):
                for outcome in kill_in_time(world, stage, kill):
                    outcomes.append(outcome)
                    print(told(outcome), flush=True)
                    log.write(json.dumps(asdict(outcome)) + "\n")
                    log.flush()
    print(table(outcomes))
    problems = [told(outcome) for outcome in outcomes if outcome.problems]
    print("\n".join(["", *problems]) if problems else "\nno problem")
    return 1 if problems else 0


# --- the run and its services


def world_at(folder: Path, *, small: bool) -> World:
    """The run in `folder`, with ports of its own where the environment names none: they stand in the report."""
    file = folder / "ports.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({name: str(free_port()) for name in ("RETRIEVAL", "SOLVER", "TRAINER")}))
    ports = json.loads(file.read_text())
    own = {f"DRZERO_{name}__PORT": port for name, port in ports.items()}
    own |= {f"DRZERO_{name}__URL": f"http://127.0.0.1:{ports[name]}" for name in ("RETRIEVAL", "SOLVER")}
    places = {f"DRZERO_STORAGE__{name.upper()}_DIR": str(folder / name) for name in ("data", "scratch")}
    environ = {**own, **os.environ, **(SMALL if small else {}), **places}
    return World(folder, environ, build_settings(environ))


@contextmanager
def reference(world: World) -> Iterator[None]:
    """A finished round, with its services for as long as the block runs; serving and state are as before afterwards."""
    if (world.folder / "aside").exists():
        raise SystemExit(f"expected no {world.folder / 'aside'}, which a killed run of this command has left; delete "
                         f"{world.folder}")  # fmt: skip
    for module in ("services.ingest", "services.retrieval.build"):
        checked(driver(world, "reference", "-m", module), module)
    with supervised(world):
        await_services(world)
        checked(driver(world, "reference", "-m", "services.trainer"), "the reference run")
        kept = {path: path.read_text(encoding="utf-8") for path in (world.note, world.run / "state.json")}
        try:
            yield
        finally:
            for path, text in kept.items():
                path.write_text(text, encoding="utf-8")


@contextmanager
def supervised(world: World) -> Iterator[None]:
    """Search and solver, started again whenever they die."""
    logs = world.folder / "scratch" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kills.") as control:
        own = {"CONTROL_DIR": control, "LOG_DIR": str(logs), "PYTHON": sys.executable, MARK: "services"}
        command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "supervisor.supervisord", "-c",
                   "supervisord.conf"]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, env={**world.environ, **own})
        try:
            yield
        finally:
            process.terminate()
            process.wait(END_S)


def await_services(world: World) -> None:
    """Return when both services answer."""
    places = {world.settings.retrieval.url: "/ready", world.settings.solver.url: "/health"}
    for url, path in places.items():
        if not until(lambda at=url + path: answers(at), START_S):  # type: ignore[misc]
            raise SystemExit(
                f"expected an answer of {url}{path} within {START_S:.0f} s; see {world.folder}/scratch/logs"
            )


def answers(url: str) -> bool:
    """Whether a service says that it is well."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except OSError:
        time.sleep(0.2)
        return False


def driver(world: World, mark: str, *words: str) -> subprocess.Popen[bytes]:
    """A command of ours in a process group of its own; its log is appended to FOLDER/driver.log."""
    with (world.folder / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env={**world.environ, MARK: mark}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def checked(process: subprocess.Popen[bytes], name: str) -> None:
    """Wait for a command that must end well."""
    if process.wait(STAGE_S):
        raise SystemExit(f"expected {name} to end well, found status {process.returncode}; see driver.log")


# --- when


def drawn(stage: str, kills: int, duration_s: float, rng: Random) -> list[Kill]:
    """The kills of a stage: of ten, four around its publication and its beginning, and two of a service it asks."""
    asks = {"solver_publish": ("solver", "solver")}.get(stage, SERVICES if stage in SAMPLING else ("tree", "driver"))

    def anywhere(target: str) -> Kill:
        return Kill(target, "lock", rng.uniform(0, duration_s))

    def ten() -> list[Kill]:
        return [
            anywhere("tree"),
            Kill("tree", "link", rng.uniform(0, NEAR_S)),
            anywhere(asks[0]),
            Kill("tree", "lock", rng.uniform(0, AT_ONCE_S)),
            anywhere("driver"),
            Kill("tree", "draft", rng.uniform(0, NEAR_S)),
            anywhere(asks[1]),
            Kill("driver", "manifest", 0.0),
            anywhere("tree"),
            anywhere("driver"),
        ]

    rounds, rest = divmod(kills, 10)
    return [kill for _ in range(rounds) for kill in ten()] + rng.sample(ten(), rest)


def happened(world: World, stage: str, event: str) -> bool:
    """Whether a driver has come so far."""
    artifact = world.artifact(stage)
    building = artifact.parent / f".{artifact.name}.building"
    if event == "lock":
        return world.lock.exists()
    if event == "link":
        return artifact.is_symlink()
    return artifact.is_symlink() or (building if event == "draft" else building / "manifest.json").exists()


def until(holds: Callable[[], bool], patience_s: float) -> bool:
    """Wait until something holds; whether it does."""
    end = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


# --- one kill


def kill_in_time(world: World, stage: str, kill: Kill) -> Iterator[Outcome]:
    """Kill, and again after half the time where the stage was over before."""
    for part in (1, 0.5, 0.25):
        outcome = kill_once(world, stage, replace(kill, delay_s=kill.delay_s * part))
        yield outcome
        if outcome.killed_at_s is not None:
            return


def kill_once(world: World, stage: str, kill: Kill) -> Outcome:
    """Do a stage once more with a kill in it, compare, and put the reference's part back."""
    await_services(world)
    wanted = read_manifest(world.artifact(stage), verify=True)
    rows = identities(world, stage)
    state_file = world.run / "state.json"
    state = state_file.read_text(encoding="utf-8")
    with set_aside(world, stage):
        without = json.loads(state)
        without["stages"].pop(f"1.{stage}")
        state_file.write_text(json.dumps(without), encoding="utf-8")
        world.note.unlink(missing_ok=True)
        outcome = Outcome(stage, kill)
        spent = strike(world, outcome) + resume(world, outcome)
        try:
            found = read_manifest(world.artifact(stage), verify=True)
        except ArtifactError as error:
            outcome.problems.append(str(error))
        else:
            outcome.same_bytes = found.identity == wanted.identity
            outcome.problems += differences(stage, wanted, found)
            outcome.problems += (
                [] if identities(world, stage) == rows else ["its rows are not the reference's, each once"]
            )
            outcome.problems += wrong_state(world, stage, found, spent)
        outcome.problems += leftovers(world)
    state_file.write_text(state, encoding="utf-8")
    return outcome


@contextmanager
def set_aside(world: World, stage: str) -> Iterator[None]:
    """Take a stage's artifact and what it has kept away while the block runs, and then put them back."""
    artifact = world.artifact(stage)
    taken = [artifact, artifact.resolve()]
    if stage in KEPT:
        taken.append(KEPT[stage](world.paths(stage)))
    aside = world.folder / "aside"
    aside.mkdir()
    for number, path in enumerate(taken):
        path.rename(aside / str(number)) if number != 1 else path.rename(aside / path.name)
    if stage in ("publish", "solver_publish"):
        lay_checkpoint(world, stage, aside / taken[1].name)
    try:
        yield
    finally:
        if stage in ("publish", "solver_publish"):
            shutil.rmtree(world.paths(stage).checkpoints, ignore_errors=True)
        for path in (*artifact.parent.glob(f".{artifact.name}.*"), *taken):
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
        for number, path in enumerate(taken):
            (aside / (path.name if number == 1 else str(number))).rename(path)
        aside.rmdir()


def lay_checkpoint(world: World, stage: str, weights: Path) -> None:
    """What the stage reads of the checkpoint that these weights came from; the real one went when they were there."""
    paths, trainer = world.paths(stage), world.settings.trainer
    steps = trainer.steps if stage == "publish" else trainer.solver.steps
    actor = paths.checkpoints / f"global_step_{steps}" / "actor"
    added = shutil.ignore_patterns(MANIFEST, CARD, "change.json")
    shutil.copytree(weights, actor / "huggingface", ignore=added)
    (actor / "model_world_size_1_rank_0.pt").touch()
    zipfile.ZipFile(actor.parent / "data.pt", "w").close()


def strike(world: World, outcome: Outcome) -> float:
    """Start the stage and kill; returns the seconds that its driver has worked."""
    kill, stage = outcome.kill, outcome.stage
    world.lock.unlink(missing_ok=True)
    process = driver(world, "killed", "-m", "services.trainer", "--from", f"1.{stage}", "--to", f"1.{stage}")

    def came_to(event: str) -> bool:
        return process.poll() is not None or happened(world, stage, event)

    until(lambda: came_to("lock"), START_S)
    locked = time.monotonic()
    until(lambda: came_to(kill.after), STAGE_S)
    until(lambda: process.poll() is not None, kill.delay_s)
    if process.poll() is None:
        outcome.killed_at_s = round(time.monotonic() - locked, 3)
        if kill.target in SERVICES:
            kill_all("services", module=f"services.{kill.target}")
        else:
            process.kill()
            if kill.target == "tree":
                kill_all("killed")
    try:
        status = process.wait(STAGE_S)
    except subprocess.TimeoutExpired:
        kill_all("killed")
        status = process.wait()
        outcome.problems.append(f"it did not end within {STAGE_S:.0f} s")
    if status != (-signal.SIGKILL if outcome.killed_at_s is not None and kill.target not in SERVICES else 0):
        outcome.problems.append(f"the driver ended with status {status}")
    return time.monotonic() - locked


def resume(world: World, outcome: Outcome) -> float:
    """The same command again, which must end well; returns the seconds that its driver has worked."""
    world.lock.unlink(missing_ok=True)
    stage = f"1.{outcome.stage}"
    process = driver(world, "resumed", "-m", "services.trainer", "--from", stage, "--to", stage)
    began = time.monotonic()
    until(lambda: process.poll() is not None or world.lock.exists(), START_S)
    locked = time.monotonic()
    try:
        status = process.wait(STAGE_S)
    except subprocess.TimeoutExpired:
        kill_all("resumed")
        status = process.wait()
    if status:
        outcome.problems.append(f"the same command again ended with status {status}")
    outcome.resumed_s = round(time.monotonic() - began, 1)
    return time.monotonic() - locked


def kill_all(mark: str, module: str = "") -> None:
    """SIGKILL to all processes of a mark (that run a module), until there are none."""
    first = ours(mark, module)

    def gone() -> bool:
        left = [pid for pid in ours(mark, module) if not module or pid in first]  # a service is started again
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    until(gone, END_S)


def ours(mark: str, module: str = "") -> list[int]:
    """The processes that were started with a mark, and run a module where one is named."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0")
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if marked and (not module or words[1:3] == [b"-m", module.encode()]):
            found.append(int(path.name))
    return found


# --- what must hold


def differences(stage: str, wanted: Manifest, found: Manifest) -> list[str]:
    """How an artifact differs from the reference's in what must be the same."""
    parts = {name: (getattr(wanted, name), getattr(found, name)) for name in ("settings", "made_from")}
    if stage not in SAMPLING:
        parts |= {"counts": (wanted.counts, found.counts), "files": (wanted.files, found.files)}
    elif stage == "questions":
        parts |= {"candidates": (wanted.counts["candidates"], found.counts["candidates"])}
    else:
        kept = [{k: v for k, v in one.counts.items() if k not in VARYING} for one in (wanted, found)]
        parts |= {"rows": (wanted.rows, found.rows), "counts": (kept[0], kept[1])}
    return [f"{name}: expected {old}, found {new}" for name, (old, new) in parts.items() if old != new]


def identities(world: World, stage: str) -> Any:
    """Which samples an artifact has, each as often as it is there; and of a journal, which names."""
    artifact, paths = world.artifact(stage), world.paths(stage)
    if stage in ("train", "solver_train"):
        lines = {name: list(read_lines(artifact / f"{name}.jsonl")) for name in ("rollouts", "held_out", "metrics")}
        rollouts = [line["rollout"] for line in lines["rollouts"]]
        samples = [Counter((line["step"], line["index"]) for line in lines[name]) for name in ("rollouts", "held_out")]
        return samples, [line["step"] for line in lines["metrics"]], len(rollouts) == len(set(rollouts))
    if stage == "questions":
        rejected = list(read_lines(artifact / "rejected.jsonl"))
        asked = Counter(row["id"] for row in [*read_rows(artifact / QUESTIONS), *rejected])
        # An id is the paper and the number of the try, a name in the journal the paper's place and that number.
        written = Counter(row["name"] for row in read_lines(paths.candidates / "candidates.jsonl"))
        checks = Counter(row["name"] for row in read_lines(paths.candidates / "checks.jsonl"))
        return asked, written, checks.keys() <= written.keys() and max(checks.values(), default=1) == 1
    if stage == "evaluate":
        files = sorted(artifact.glob("answers-*.jsonl"))
        journals = [Counter(row["name"] for row in read_lines(file))
                    for file in sorted(KEPT[stage](paths).glob("*/answers.jsonl"))]  # fmt: skip
        return [Counter((row["set"], row["id"]) for row in read_lines(file)) for file in files], journals
    return None


def wrong_state(world: World, stage: str, found: Manifest, spent_s: float) -> list[str]:
    """What state.json says of the stage and should not; a kill may cost it the last seconds before."""
    entry = read_state(world.run).get(f"1.{stage}")
    if entry is None or entry["artifact"] != found.identity or not entry["finished"]:
        return [f"state.json does not have the stage as finished: {entry}"]
    least = spent_s - BEAT_S - 2 * AROUND_S
    if not least <= entry["seconds"] <= spent_s + 1:
        return [f"state.json has {entry['seconds']} s of {spent_s:.1f} s"]
    return []


AROUND_S = 5.0  # of a driver, between its lock and the stage, and after the stage


def leftovers(world: World) -> list[str]:
    """Drafts, temporary files and processes that nobody needs any more."""
    until(lambda: not (ours("killed") or ours("resumed")), END_S)
    left = [f"process {pid} still runs" for mark in ("killed", "resumed") for pid in ours(mark)]
    for top in (world.folder / "data", world.folder / "scratch"):
        there = [path for path in top.rglob(".*") if TEMPORARY.fullmatch(path.name)]
        current = {path.resolve() for path in top.rglob("*") if path.is_symlink()}
        left += [f"{path.relative_to(world.folder)} is left" for path in there if path not in current]
    return left


# --- the table


def told(outcome: Outcome) -> str:
    """A line about one kill."""
    kill = outcome.kill
    when = "too late" if outcome.killed_at_s is None else f"{outcome.killed_at_s:.3f} s after the lock"
    same = "same bytes" if outcome.same_bytes else "other bytes"
    words = f"{outcome.stage}: {kill.target} at {kill.after} + {kill.delay_s:.3f} s, {when}; resumed in " \
        f"{outcome.resumed_s} s, {same}"  # fmt: skip
    return "; PROBLEM: ".join([words, *outcome.problems])


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per stage, in Markdown."""
    lines = [
        "| stage | kills: tree, driver, service, too late | moments, s after the lock | resumed in, s | must equal the "
        "reference | same bytes | problems |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage in dict.fromkeys(outcome.stage for outcome in outcomes):
        some = [outcome for outcome in outcomes if outcome.stage == stage]
        moments = [outcome.killed_at_s for outcome in some if outcome.killed_at_s is not None]
        whom = Counter(
            "late" if one.killed_at_s is None else "service" if one.kill.target in SERVICES else one.kill.target
            for one in some
        )
        cells = [
            f"`{stage}`",
            ", ".join(str(whom[name]) for name in ("tree", "driver", "service", "late")),
            f"{min(moments):.2f} to {max(moments):.2f}" if moments else "",
            f"{min(one.resumed_s for one in some)} to {max(one.resumed_s for one in some)}",
            "counts, samples" if stage in SAMPLING else "all bytes",
            f"{sum(one.same_bytes for one in some)} of {len(some)}",
            str(sum(bool(one.problems) for one in some)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def free_port() -> int:
    """A port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def named(text: str) -> list[str]:
    """Stages by name; ArgumentTypeError for another."""
    stages = text.split(",")
    if not set(stages) <= STAGES.keys():
        raise argparse.ArgumentTypeError(f"expected some of {','.join(STAGES)}, found {text}")
    return stages


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill a run at random moments and compare what it ends with.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--stages", type=named, default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` must put the reference back too
    raise SystemExit(main(parsed()))

"""What the run page says, from the files of a run alone: no service, no Redis, no driver needs to be there.

`standing` is what the run does now, `training_view` a training's curves and the anatomy of its reward, `evaluations`
what the rounds have taught. Nothing here writes.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from services.trainer.charts import Chart, draw, short
from services.trainer.control import requested
from services.trainer.driver import is_driven, read_driver
from services.trainer.gate import form_at
from services.trainer.guards import alarms
from services.trainer.outage import read_outage
from services.trainer.page_index import Key, Numbers, RunIndex
from services.trainer.report import ANSWER_PARTS, PARTS, TIMES, exam_rows
from services.trainer.rounds import Role, paths_of
from services.trainer.run_state import read_state
from services.trainer.step_metrics import step_times
from shared.settings import Settings

Family = tuple[str, tuple[tuple[str, str], ...]]  # heading, then names and values
RECENT = 10  # steps that a mean of the newest ones is over
ROLES: Mapping[str, Role] = {"train": "proposer", "solver_train": "solver"}  # stage → what it trains
JOURNALS = ("questions/candidates.jsonl", "questions/checks.jsonl")  # of a round, beside its roles' folders

PROPOSER_CHARTS = (
    ("Reward", (("score_mean", "mean"),)),
    ("Format and difficulty", (("format_mean", "format F"), ("difficulty_mean", "difficulty D"))),
    (
        "Questions solved",
        (("solvable_share", "sometimes"), ("never_solved_share", "never"), ("always_solved_share", "always")),
    ),
)
SOLVER_CHARTS = (
    ("Right answers", (("score_mean", "exact"), ("biomedical_match_mean", "synonyms too"))),
    ("Answered", (("answered_mean", "share"),)),
)
LEARNING_CHARTS = (
    ("Entropy, nats", (("actor/entropy", "mean of tokens"),)),
    ("KL, nats", (("rollout_corr/k3_kl", "rollout ‖ trained, k3"), ("actor/ppo_kl", "of the update"))),
    ("Gradient norm", (("actor/grad_norm", "before clipping"),)),
    ("Response length, tokens", (("response_length/mean", "mean"), ("response_length/max", "longest"))),
    ("Searches a rollout", (("searches_a_rollout", "with papers"), ("failed_a_rollout", "failed"))),
    ("Seconds a step", (("timing_s/step", "whole step"),)),
    ("Lost rollouts, share", (("invalid_share", "invalid"),)),
)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a run does now. `words` is one sentence of it."""

    words: str
    driven: bool
    stage: str
    since: str
    step: str
    ends: str
    requested: str
    waiting: str
    training: Key | None  # the one that runs, or ran last
    stages: tuple[tuple[str, str, str], ...]  # label, when it finished, seconds


@dataclass(frozen=True, slots=True)
class Part:
    """A number of the newest step, its mean over the newest ones, and what it was at first."""

    name: str
    now: str
    recent: str
    first: str
    share: float  # of a whole bar


@dataclass(frozen=True, slots=True)
class TrainingView:
    """One training as the page shows it."""

    key: Key
    steps: int
    charts: tuple[Chart, ...]
    parts: tuple[Part, ...]
    times: tuple[Part, ...]
    shares: tuple[Family, ...]


def standing(settings: Settings, run: Path, index: RunIndex) -> Standing:
    """What the run in this folder does now, and what is wrong with it."""
    driver, driven, asked = read_driver(run), is_driven(run), requested(run)
    stage = str(driver.get("stage", ""))
    number, _, name = stage.partition(".")
    role = ROLES.get(name)
    key = (int(number), role) if role else None
    step = ends = waiting = ""
    if key is not None:
        step, ends = progress(index, key, driver["steps"][role], settings)
        waiting = waiting_text(settings, key)
    elif name:
        step = journal_lines(settings, int(number))
    return Standing(
        words=in_words(driver, driven, stage),
        driven=driven,
        stage=stage,
        since=clock(driver["since"]) if "since" in driver else "",
        step=step,
        ends=ends if driven else "",
        requested=asked or "",
        waiting=str(driver.get("waiting") or waiting) if driven else waiting,
        training=key,
        stages=tuple(
            (label, finish_of(done), duration(done["seconds"]) if done["finished"] else "")
            for label, done in read_state(run).items()
        ),
    )


def finish_of(stage: Mapping[str, Any]) -> str:
    """When a stage of state.json has finished; "" when it has not."""
    return clock(datetime.fromisoformat(stage["finished"]).timestamp()) if stage["finished"] else ""


def in_words(driver: Mapping[str, Any], driven: bool, stage: str) -> str:
    """One sentence on the run: that it works, how it ended, or that nobody drives it."""
    if driven:
        began = stage and driver.get("ended") is None
        return f"running, stage {stage}" if began else "a command holds the run and has not begun a stage"
    if not driver:
        return "not running; nothing has been run under this name yet, or before this page existed"
    ended = driver.get("ended")
    return f"not running: {ended}" if ended else f"not running: the driver was killed in stage {stage}"


def progress(index: RunIndex, key: Key, total: int, settings: Settings) -> tuple[str, str]:
    """Words for how far a training is, and when it will end, if that can be said."""
    steps = index.steps(key)
    done = max(steps, default=0)
    text = f"step {done} of {total}"
    if done < total and (judged := index.rolled_out(key, done + 1)):
        text += f", {judged} {'rollout' if judged == 1 else 'rollouts'} of the next judged"
    seconds = [numbers["timing_s/step"] for numbers in list(steps.values())[-RECENT:]]
    if not seconds or done >= total:
        return text, ""
    left = median(seconds) * (total - done)
    end = newest_time(settings, key) + left
    return text, f"about {duration(left)} left, until {clock(end)}" if end > time.time() else ""


def newest_time(settings: Settings, key: Key) -> float:
    """When a training last finished a step: its metrics file was written then."""
    log = paths_of(settings, key[0], role_of(key)).log
    return max((file.stat().st_mtime for file in log.glob("metrics-*.jsonl")), default=time.time())


def role_of(key: Key) -> Role:
    """The role of a training."""
    return "proposer" if key[1] == "proposer" else "solver"


def waiting_text(settings: Settings, key: Key) -> str:
    """Why a training waits, or what it was lost to; "" for neither."""
    paths = paths_of(settings, key[0], role_of(key))
    try:
        return str(json.loads(paths.waiting.read_text(encoding="utf-8"))["text"])
    except (OSError, ValueError):
        return read_outage(paths.outage) or ""


def raised_alarms(settings: Settings, key: Key | None, index: RunIndex) -> tuple[tuple[str, str], ...]:
    """Name and text of each alarm of a training's newest step, by the guards of these settings."""
    if key is None:
        return ()
    gate, reward = paths_of(settings, key[0], role_of(key)).gate, settings.trainer.reward
    steps = index.steps(key)
    history = {s: n | {"drzero/gated": float(form_at(s, reward, gate) == "gated")} for s, n in steps.items()}
    return tuple((alarm.name, alarm.text) for alarm in alarms(history, settings.trainer.guards))


def journal_lines(settings: Settings, number: int) -> str:
    """How many candidates and checks of a round stand in its journals, in words; "" for none."""
    folder = paths_of(settings, number, "proposer").candidates.parent
    counts = [(Path(name).stem, count_lines(folder / name)) for name in JOURNALS]
    return ", ".join(f"{count} {name}" for name, count in counts if count)


def count_lines(file: Path) -> int:
    """Lines of a file; 0 when it is not there."""
    if not file.is_file():
        return 0
    with file.open("rb") as stream:
        return sum(1 for _ in stream)


def training_view(index: RunIndex, key: Key) -> TrainingView:
    """Curves and anatomy of a training."""
    steps = {step: with_searches(numbers) for step, numbers in index.steps(key).items()}
    proposer = key[1] == "proposer"
    charts = [
        draw(title, {name: {s: n[metric] for s, n in steps.items() if metric in n} for metric, name in curves})
        for title, curves in (*(PROPOSER_CHARTS if proposer else SOLVER_CHARTS), *LEARNING_CHARTS)
    ]
    newest = list(steps.values())[-1] if steps else {}
    times = [step_times(numbers) | {"step": numbers["timing_s/step"]} for numbers in steps.values()]
    return TrainingView(
        key,
        len(steps),
        tuple(chart for chart in charts if chart is not None),
        tuple(
            anatomy(list(steps.values()), [(f"{n}_mean", label) for n, label in (PARTS if proposer else ANSWER_PARTS)])
        ),
        tuple(anatomy(times, TIMES, whole="step")),
        by_hop(newest)
        + tuple(
            (heading, found)
            for heading, prefix in (
                ("Right attempts, share of questions", "solved/"),
                ("Kinds of question, share", "reasoning/"),
                ("Attempts by how they ended", "ended/"),
                ("Rollouts lost, by reason", "invalid/"),
                ("Broken search calls", "calls_broken/"),
            )
            if (found := members(newest, prefix))
        ),
    )


def with_searches(numbers: Numbers) -> Numbers:
    """The numbers of a step, with its searches per rollout."""
    rollouts = numbers.get("rollouts")
    if not rollouts:
        return numbers
    made, failed = numbers["searches_made"], numbers["searches_failed"]
    return numbers | {"searches_a_rollout": made / rollouts, "failed_a_rollout": failed / rollouts}


def members(numbers: Numbers, prefix: str) -> tuple[tuple[str, str], ...]:
    """The members of one family of `step_metrics`, without its prefix."""
    found = {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}
    return tuple((name.replace("/", " "), short(value)) for name, value in found.items())


def by_hop(numbers: Numbers) -> tuple[Family, ...]:
    """Rollouts of each number of hops and their reward, as one family; none when there are no rollouts."""
    rows = tuple(
        (
            f"{hop} {'hop' if hop == 1 else 'hops'}",
            f"{numbers[f'hop/{hop}/count']:.0f} of {short(numbers[f'hop/{hop}/score_mean'])}",
        )
        for hop in range(1, 5)
        if f"hop/{hop}/count" in numbers
    )
    return (("Rollouts by hops, and their mean reward", rows),) if rows else ()


def anatomy(steps: Sequence[Numbers], parts: Sequence[tuple[str, str]], whole: str = "") -> list[Part]:
    """The parts that any step has: now, of late and at first; bars are shares of 1, or of the newest part `whole`."""
    made = []
    for name, label in parts:
        values = [numbers[name] for numbers in steps if math.isfinite(numbers.get(name, math.nan))]
        if not values:
            continue
        recent = values[-RECENT:]
        full = steps[-1].get(whole, 1.0) if whole else 1.0
        share = min(1.0, max(0.0, values[-1] / full)) if full > 0 else 0.0
        made.append(Part(label, short(values[-1]), short(sum(recent) / len(recent)), short(values[0]), share))
    return made


def evaluations(run: Path) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """The rows of each evaluation set: label and marks of the base and of every round, as in the report."""
    files = sorted(run.glob("[0-9]*/evaluation/evaluation.json"), key=lambda file: int(file.parts[-3]))
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {name: exam_rows(name, read) for one in read for name in one["sets"]}


def reports(run: Path) -> list[int]:
    """Rounds that have a report."""
    return sorted(int(page.parts[-3]) for page in run.glob("[0-9]*/report/report.html"))


def clock(moment: float) -> str:
    """A time of day, with its day when that is another one, in this machine's time zone."""
    then = datetime.fromtimestamp(moment).astimezone()
    today = then.date() == datetime.now().astimezone().date()
    return then.strftime("%H:%M %Z" if today else "%d %b %H:%M %Z")


def duration(seconds: float) -> str:
    """Seconds in words of at most two units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"

"""Solver and search at one address, with weights to swap, and small artifacts of a run: for tests of rounds."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_services import Fault, Handler, Reply, chat_reply, search_reply, watched

from services.trainer.journal import Row
from services.trainer.judge import Surroundings, judge
from services.trainer.paths import RunPaths
from services.trainer.questions import FILE, question_counts, question_row, read_candidate
from services.trainer.records import HELD_OUT, TRAIN, Verdict
from services.trainer.reward import attempt_row, read_proposal, rollout_row, score_answer
from services.trainer.rounds import paths_of
from services.trainer.seeds import write_rows
from shared.files import publish, read_manifest
from shared.records import Attempt
from shared.settings import Settings, changed

CHAT = "/v1/chat/completions"

Says = Callable[[dict[str, Any]], str | Reply | Fault]  # what a model answers to the body of a chat


class AnswersGets(Handler):
    """Hands a GET to the same function as a POST, with an empty body."""

    def do_GET(self) -> None:  # noqa: N802  # the name that http.server calls
        reply = self.server.answer(self.path, {})
        self.play(reply if isinstance(reply, Fault) else Fault(reply[0], json.dumps(reply[1]).encode()))


@dataclass
class World:
    """What is served, and what has been asked so far."""

    model: str
    url: str = ""
    chats: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # weights that answered, body
    searches: list[dict[str, Any]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    refusal: str = ""  # why it loads no weights
    stubborn: bool = False  # says that it has loaded weights and has not
    peak: int = 0  # most requests at once, known in the end

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of all chats."""
        return [body for _, body in self.chats]


@contextmanager
def world_of(says: Says | Mapping[str, Says], *, model: str = "", pmid: str = "7") -> Iterator[World]:
    """A world whose model says what `says` tells, by weights where it is a mapping; each search finds paper `pmid`."""
    world = World(model)

    def answer(path: str, body: dict[str, Any]) -> Reply | Fault:
        if path == CHAT:
            world.chats.append((world.model, body))
            said = (says[world.model] if isinstance(says, Mapping) else says)(body)
            return chat_reply(said) if isinstance(said, str) else said
        if path == "/search":
            world.searches.append(body)
            return search_reply(body["queries"], pmid)
        if path == "/update_weights_from_disk":
            if world.refusal:
                return 400, {"success": False, "message": world.refusal}
            if world.stubborn:
                return 200, {"success": True}
            world.model = body["model_path"]
            world.loaded.append(world.model)
        return 200, {"model_path": world.model}

    with watched(answer, handler=AnswersGets) as service:
        world.url = service.url
        yield world
        world.peak = service.peak


def save_words(folder: Path) -> str:
    """A model folder with nothing but a tokenizer, for which a word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder.resolve())


def settings_at(folder: Path, url: str = "http://127.0.0.1:1", **changes: Any) -> Settings:
    """Settings of a run in `folder` with both services at `url`; `trainer__seed=3` changes `trainer.seed`."""
    model = save_words(folder / "base")
    given = {name.replace("__", "."): value for name, value in changes.items()}
    places = {"storage.data_dir": folder / "data", "storage.scratch_dir": folder / "scratch"}
    addresses = {"solver.url": url, "retrieval.url": url, "solver.context_tokens": 100_000}
    models = {"solver.model": model, "trainer.actor.model": model, "trainer.patience_s": 5.0}
    return changed(Settings(), {**places, **addresses, **models, "trainer.min_abstract_words": 0, **given})


def publish_files(target: Path, files: Mapping[str, str], *, settings: Mapping[str, Any] | None = None,
                  counts: Mapping[str, int] | None = None) -> None:  # fmt: skip
    """An artifact of these texts."""
    with publish(target, settings=settings or {}, made_from={"test": target.name}) as draft:
        for name, text in files.items():
            (draft.path / name).write_text(text, encoding="utf-8")
        draft.rows, draft.counts = len(files), dict(counts or {})


def publish_weights_at(target: Path, name: str) -> str:
    """Weights that are none, told apart by `name`; returns their folder as a solver is told it."""
    training = target.with_name("training")
    origin = {"training": read_manifest(training).identity} if training.exists() else {}
    with publish(target, settings={}, made_from={"test": name, **origin}) as draft:
        save_words(draft.path)
        change = {"tensors": 2, "changed_tensors": 1, "changed_share": 0.5, "relative_change": 1e-3}
        (draft.path / "change.json").write_text(json.dumps(change), encoding="utf-8")
    return str(target.resolve())


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- a round that has been trained


def proposer_verdict(step: int, *, split: str = TRAIN, right: int = 1, attempts: int = 3, **changes: Any) -> Verdict:
    """The log's line of a proposer's rollout of one hop about paper 7, with `right` of its attempts right."""
    row = {"pmid": "7", "document": "Zinc heals.", "split": split, "index": 0} | changes
    question, answer = str(row.pop("question", "Which metal heals?")), str(row.pop("answer", "zinc"))
    turn = f"<think>I ask.</think><question>{question}</question><answer>{answer}</answer>"
    trajectory = {"turns": [turn], "searches": row.pop("searches", []), "step": step}
    proposal = read_proposal(trajectory, hop=1, info=row)
    made = [
        Attempt(answer if number < right else f"no {answer}", "answered", 0, seed=number, seconds=0.1)
        for number in range(attempts)
    ]
    numbers = judge(proposal, made, Settings().trainer.reward, Surroundings("gated", (), lambda _: True))
    return {
        **rollout_row(trajectory, row, began=0.0), "hop": 1, "question": question, "answer": answer,
        "attempts": [attempt_row(one) for one in made], "invalid_reason": "", "reasoning_type": "entity",
        "seconds_attempts": 0.1, **numbers,
    }  # fmt: skip


def solver_verdict(step: int, answer: str, *, split: str = TRAIN, gold: str = "zinc") -> Verdict:
    """The log's line of a solver's rollout that answers in one turn."""
    info = {"pmid": "7", "hop": 1, "question": "Which metal heals?", "answer": gold, "split": split, "index": 0}
    turns = [f"<think>So.</think><answer>{answer}</answer>"]
    return score_answer({"turns": turns, "searches": [], "step": step}, info)[1]


def question_of(name: str, question: str, answer: str, *, held_out: bool, pmid: str = "7") -> Row:
    """A row of questions.parquet: right twice of three times with the evidence."""
    turn = f"<question>{question}</question><answer>{answer} (PMID {pmid})</answer>"
    search = {"queries": ["metal"], "pmids": ["8"], "text": f"PMID 8: It is {answer}."}
    row = {"name": name, "pmid": pmid, "hop": 2, "document": "Metals.", "turns": [turn], "searches": [search]}
    return question_row(read_candidate(row), (2, 0), 3, held_out=held_out)


def publish_training(paths: RunPaths, before: Sequence[Verdict], after: Sequence[Verdict], steps: int) -> None:
    """A training whose held-out rollouts are these, and whose steps look like the last ones."""
    rollouts = [{**one, "split": TRAIN, "step": step} for step in range(1, steps + 1) for one in after]
    metrics = [
        {"step": step, "timing_s/step": 10.0, "timing_s/gen": 4.0, "actor/grad_norm": 0.5, "actor/entropy": 1.0,
         "rollout_corr/kl": 0.01}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    files = {"rollouts": rollouts, "metrics": metrics, "held_out": [*before, *after]}
    texts = {f"{name}.jsonl": json_lines(rows) for name, rows in files.items()}
    publish_files(paths.training, texts, settings={"steps": steps})


def publish_round(settings: Settings, number: int, questions: Sequence[Row], steps: int = 2) -> str:
    """Everything of a round that comes before its evaluation; returns the solver's weights as it is told them."""
    proposer, solver = paths_of(settings, number, "proposer"), paths_of(settings, number, "solver")
    if not proposer.index.exists():
        publish_files(proposer.index, {"index": "made"})
    hard, fair = (proposer_verdict(step, split=HELD_OUT, right=k) for step, k in ((0, 0), (steps, 1)))
    publish_training(proposer, [hard], [fair], steps)
    said = [solver_verdict(step, text, split=HELD_OUT) for step in (0, steps) for text in ("lead", "zinc")]
    publish_training(solver, [said[0]] * 2, said[2:], steps)
    publish_weights_at(proposer.weights, f"proposer {number}")
    with publish(proposer.questions, settings={}, made_from={"test": str(number)}) as draft:
        write_rows(list(questions), draft.path / FILE)
        draft.counts = question_counts([], questions, [{"reason": "known"}] * 2) | {"candidates": len(questions) + 2}
    return publish_weights_at(solver.weights, f"solver {number}")

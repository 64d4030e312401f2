"""PubMedQA twice: by the harness, and by a short program that shares none of its code; then what differs.

    PYTHONPATH=. python tests/direct_evaluation.py ori_pqal.json.gz --questions 200 --work FOLDER

Needs the services solver and retrieval, as `python -m services.trainer.ask` does. The direct side loads the weights
that the solver says it serves and answers one question at a time, with one plain greedy loop over logits. Of this
project it takes the settings and the prompts' texts, and searches through the search service. Both sides keep their
answers in FOLDER and go on there. A text that differs comes with the margin of its logits: how far, where both part,
the token of the harness lies below the direct one's. With --dtype as the solver has it, a margin much above the
rounding of that type would be a defect.
"""

import argparse
import asyncio
import gzip
import json
import re
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from services.trainer.evaluation_sets import read_set
from services.trainer.exam import Graded, take_exam
from services.trainer.protocol import PROMPTS, SEARCH_TOOL
from shared.settings import Settings, load_settings

CHOICES = ("yes", "no", "maybe")
CALL = re.compile(r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", re.DOTALL)
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
ARTICLES = re.compile(r"\b(a|an|the)\b")

Row = dict[str, Any]


@dataclass
class Model:
    """A causal LM with the cache of the tokens that it read last."""

    folder: str
    dtype: str
    read: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.network = AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, self.dtype)).eval()
        self.cache = DynamicCache()

    @torch.inference_mode()
    def next_logits(self, ids: list[int]) -> torch.Tensor:
        """The logits after `ids`; what they share with the tokens read before is not read again."""
        pairs = zip(self.read, ids[:-1], strict=False)
        same = next((n for n, (old, new) in enumerate(pairs) if old != new), min(len(self.read), len(ids) - 1))
        self.cache.crop(same)
        out = self.network(torch.tensor([ids[same:]]), past_key_values=self.cache, logits_to_keep=1)
        self.read = list(ids)
        logits: torch.Tensor = out.logits[0, -1].float()
        return logits

    def reply(self, messages: list[Row], most: int) -> Row:
        """The most likely next token again and again, until the end token or `most` tokens."""
        encoded = self.tokenizer.apply_chat_template(messages, tools=[SEARCH_TOOL], add_generation_prompt=True)
        prompt, new, logits = list(encoded["input_ids"]), [], []
        while len(new) < most and self.tokenizer.eos_token_id not in new:
            logits.append(self.next_logits([*prompt, *new]))
            new.append(int(logits[-1].argmax()))
        return {"text": self.tokenizer.decode(new, skip_special_tokens=True), "ids": new, "logits": logits}

    def cut(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text."""
        ends = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(ends) <= tokens else text[: ends[tokens - 1][1]] if tokens else ""


# --- the direct side


def conversation(question: str, settings: Settings) -> list[Row]:
    """System message, worked examples, and the question with its choices."""
    folder = PROMPTS / settings.trainer.prompts
    request = (folder / "solver.md").read_text(encoding="utf-8").strip()
    examples = json.loads((PROMPTS / "solver_examples.json").read_text(encoding="utf-8"))
    messages = [{"role": "system", "content": (folder / "solver_system.md").read_text(encoding="utf-8").strip()}]
    for name in ("search", "last")[2 - settings.trainer.reward.worked_examples :]:
        messages += [{"role": "user", "content": request.format(question=examples[name]["question"])}]
        messages += examples[name]["turns"]
    asked = f"{question} Answer with one of: yes, no, maybe."
    return [*messages, {"role": "user", "content": request.format(question=asked)}]


def queries_in(text: str) -> list[str]:
    """The queries of all well-formed search calls of a turn."""
    queries = []
    for body in CALL.findall(text):
        try:
            call = json.loads(body)
            found = call["arguments"]["query_list"] if call["name"] == "search" else []
        except (ValueError, TypeError, KeyError):
            continue
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            queries += [one.strip()[:1000] for one in found if one.strip()][:8]
    return queries


def search(queries: list[str], model: Model, settings: Settings) -> str:
    """What the model reads of its search: the papers share `max_tool_tokens` evenly."""
    body = {"queries": queries, "top_k": settings.trainer.search_top_k}
    reply = httpx.post(f"{settings.retrieval.url}/search", json=body, timeout=120).raise_for_status().json()
    found = [[hit["document"] for hit in one["hits"]] for one in reply["results"]]
    most = settings.trainer.reward.max_tool_tokens
    share = most // max(1, sum(map(len, found)))
    blocks = []
    for query, papers in zip(queries, found, strict=True):
        lines = [f"PMID {one['pmid']}: {one['title']}. {one['abstract']}" for one in papers]
        head = [f"Results for: {query}"] if len(queries) > 1 else []
        blocks.append("\n".join([*head, *(model.cut(line, share) for line in lines)]) if papers else "No paper found.")
    return model.cut("\n\n".join(blocks), most)


def answer_directly(question: str, model: Model, settings: Settings) -> Row:
    """Turns and answer of one question."""
    reward, messages, turns = settings.trainer.reward, conversation(question, settings), []
    note = (PROMPTS / "solver_last_turn.md").read_text(encoding="utf-8").strip()
    for number in range(1, reward.max_turns + 1):
        turns.append(model.reply(messages, reward.max_new_tokens))
        text = turns[-1]["text"]
        queries = queries_in(text)
        if [*ANSWER.findall(text), ""][-1].strip() or len(turns[-1]["ids"]) == reward.max_new_tokens or not queries:
            break
        if number < reward.max_turns:
            result = search(queries, model, settings) + (f"\n\n{note}" if number == reward.max_turns - 1 else "")
            messages += [{"role": "assistant", "content": text}, {"role": "tool", "content": result}]
    said = ["", *ANSWER.findall("\n".join(turn["text"] for turn in turns))][-1]
    return {"answer": choice_in(said), "turns": turns}


def choice_in(answer: str) -> str:
    """The choice that an answer begins with, or ""."""
    first = (ARTICLES.sub(" ", answer.lower()).split() or [""])[0].strip(string.punctuation)
    return first if first in CHOICES else ""


# --- what differs


def parting(model: Model, turn: Row, other: str) -> tuple[int, float] | None:
    """Where a turn of the direct side leaves the `other` text: the token's place, and the margin of its logits there.

    The margin is that to the likeliest token with which the other text could go on; None where both are the same.
    """
    if turn["text"] == other:
        return None
    ids = turn["ids"]
    decode = model.tokenizer.decode
    same = next(n for n in range(len(ids) + 1) if n == len(ids) or not goes_on(decode(ids[: n + 1]), other))
    logits = turn["logits"][min(same, len(ids) - 1)]
    for token in logits.argsort(descending=True).tolist():
        text = decode([*ids[:same], token], skip_special_tokens=True)
        if token != ids[min(same, len(ids) - 1)] and goes_on(text, other):
            return same, float(logits.max() - logits[token])
    return same, float("inf")


def goes_on(begun: str, whole: str) -> bool:
    """Whether a text begins another; a letter of which not all bytes are there yet does not count."""
    return whole.startswith(begun.removesuffix("<|im_end|>").rstrip("\N{REPLACEMENT CHARACTER}"))


def difference(model: Model, direct: Row, one: Graded) -> Row | None:
    """How a question was answered differently, or None where the texts of all turns are the same."""
    texts = [turn["text"] for turn in direct["turns"]]
    if texts == one.row["turns"]:
        return None
    pairs = list(zip(direct["turns"], one.row["turns"], strict=False))
    partings = ((n, parting(model, turn, said)) for n, (turn, said) in enumerate(pairs, start=1))
    turn, place = next(((n, found) for n, found in partings if found), (len(pairs) + 1, (0, float("inf"))))
    return {"turn": turn, "token": place[0], "margin": place[1]}


def compared(path: Path, count: int, work: Path, settings: Settings, *, dtype: str) -> list[Row]:
    """Per question what both sides say and, where their texts part, where and by which margin."""
    items = read_set(path)[:count]
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    records = list(json.loads(text).items())[:count]
    work.mkdir(parents=True, exist_ok=True)
    graded = asyncio.run(take_exam(settings, items, work / "harness.jsonl"))
    info = httpx.get(f"{settings.solver.url}/get_model_info", timeout=60).raise_for_status().json()
    model = Model(info["model_path"], dtype)
    file = work / "direct.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    with file.open("a", encoding="utf-8") as stream:
        for (pmid, record), one in list(zip(records, graded, strict=True))[len(rows) :]:
            direct = answer_directly(record["QUESTION"], model, settings)
            right = direct["answer"] == record["final_decision"]
            row = {
                "id": pmid, "gold": record["final_decision"], "direct": direct["answer"], "harness": one.answer,
                "direct_right": right, "harness_right": one.right, "parts": difference(model, direct, one),
            }  # fmt: skip
            rows.append(row)
            stream.write(json.dumps(row) + "\n")
            stream.flush()
    return rows


def summary(rows: Sequence[Row]) -> list[str]:
    """The lines that are printed."""
    parted = [row for row in rows if row["parts"]]
    sides = {side: sum(row[f"{side}_right"] for row in rows) for side in ("harness", "direct")}
    return [
        f"questions {len(rows)}; right: harness {sides['harness']}, direct {sides['direct']}",
        f"answers that differ: {sum(row['direct'] != row['harness'] for row in rows)}; "
        f"marks that differ: {sum(row['direct_right'] != row['harness_right'] for row in rows)}; "
        f"texts that differ: {len(parted)}",
        *(
            f"{row['id']}: turn {row['parts']['turn']}, token {row['parts']['token']}, margin "
            f"{row['parts']['margin']:.2g}; harness {row['harness'] or 'none'}, direct {row['direct'] or 'none'}, "
            f"gold {row['gold']}"
            for row in parted
        ),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="PubMedQA by the harness and by a short program of its own.")
    parser.add_argument("file", type=Path, help="PubMedQA's ori_pqal.json, plain or .gz")
    parser.add_argument("--questions", type=int, default=100, help="the first ones that are asked")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the answers of both sides")
    parser.add_argument("--dtype", default="float32", help="precision of the direct side")
    given = parser.parse_args()
    found = compared(given.file, given.questions, given.work, load_settings(), dtype=given.dtype)
    sys.stdout.write("\n".join(summary(found)) + "\n")

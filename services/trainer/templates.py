"""Whether the models suit conversations with tools: positions, tokenizer, chat template; part of `checks.py`.

A probe conversation with one message per role is rendered in a model's template, in a child process, and looked at.
Problems are sentences with expected, found and the variable to change.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from services.trainer.fitting import load_tokenizer, prompt_lengths
from services.trainer.protocol import SEARCH_TOOL, Message, solver_messages
from shared.command import UsageError
from shared.files import ArtifactError
from shared.model_files import resolve_model
from shared.settings import Settings, TrainerSettings

QUESTION_TOKENS = 64  # what a question may add to the solver's first prompt
PROBE: tuple[Message, ...] = tuple(
    {"role": role, "content": f"A word of the {role}."} for role in ("system", "user", "assistant", "tool")
)


@dataclass(frozen=True, slots=True)
class Rendering:
    """The probe conversation in a model's chat template, with the tool's schema."""

    text: str
    prompt: str  # the same with the opening of a reply
    end_of_turn: str  # the tokenizer's, or ""


def model_problems(settings: Settings, child: ProcessPoolExecutor) -> list[str]:
    """What is wrong with context, tokenizer and chat template of proposer and solver; loads them in `child`."""
    trainer, reward = settings.trainer, settings.trainer.reward
    try:
        proposer = resolve_model(trainer.actor.model, settings)
        solver = resolve_model(settings.solver.model, settings)
    except ArtifactError as error:
        return [str(error)]
    problems = position_problems(proposer, trainer)
    first = solver_messages("", trainer.prompts, reward.worked_examples)
    try:
        for model, name in {proposer: "TRAINER__ACTOR__MODEL", solver: "SOLVER__MODEL"}.items():
            rendering = child.submit(render_probe, model).result()
            problems += [f"{problem}; change DRZERO_{name}" for problem in template_problems(rendering, model)]
        (length,) = child.submit(prompt_lengths, solver, [first]).result()
    except UsageError as error:
        return [*problems, str(error)]
    needed = length + QUESTION_TOKENS + reward.max_new_tokens
    if needed > settings.solver.context_tokens:
        problems.append(
            f"expected DRZERO_SOLVER__CONTEXT_TOKENS of at least {needed} (prompt {length}, question "
            f"{QUESTION_TOKENS}, DRZERO_TRAINER__REWARD__MAX_NEW_TOKENS {reward.max_new_tokens}), found "
            f"{settings.solver.context_tokens}; raise it or lower DRZERO_TRAINER__REWARD__WORKED_EXAMPLES"
        )
    return problems


def position_problems(model: str, trainer: TrainerSettings) -> list[str]:
    """Whether prompt and response fit the model's positions, where its config lies in a local folder."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return []
    config = json.loads(file.read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    needed = trainer.prompt_tokens + trainer.response_tokens
    if positions is None or needed <= positions:
        return []
    return [
        f"expected DRZERO_TRAINER__PROMPT_TOKENS + DRZERO_TRAINER__RESPONSE_TOKENS within the {positions} positions of "
        f"{model}, found {trainer.prompt_tokens} + {trainer.response_tokens} = {needed}; lower them"
    ]


def render_probe(model: str) -> Rendering:
    """The probe in a model's template. For a child process; raises UsageError when the template refuses it."""
    from jinja2 import TemplateError

    tokenizer = load_tokenizer(model)
    try:
        text, prompt = (
            tokenizer.apply_chat_template(
                list(PROBE), tools=[SEARCH_TOOL], add_generation_prompt=opened, tokenize=False
            )
            for opened in (False, True)
        )
    except TemplateError as error:
        raise UsageError(
            f"expected {model} to have a chat template for the roles system, user, assistant and tool, but it refuses "
            f"them ({error}); change DRZERO_TRAINER__ACTOR__MODEL or DRZERO_SOLVER__MODEL"
        ) from error
    return Rendering(text, prompt, tokenizer.eos_token or "")


def template_problems(rendering: Rendering, model: str) -> list[str]:
    """What a rendering of the probe lacks for conversations with tools."""
    text = rendering.text
    places = [text.find(message["content"]) for message in PROBE]
    if -1 in places or places != sorted(places):
        return [f"expected the chat template of {model} to show every message in order, found it does not"]
    problems = []
    if not all(word in text for word in ("search", "query_list")):
        problems.append(f"expected the chat template of {model} to show the tool's schema, found it does not")
    openings = list(_openings(text, places))
    if any(one.endswith(other) for one in openings for other in openings if one is not other):
        problems.append(f"expected the chat template of {model} to keep the four roles apart, found it does not")
    if not rendering.prompt.startswith(text) or rendering.prompt == text:
        problems.append(f"expected the chat template of {model} to open the reply at the end, found it does not")
    if not rendering.end_of_turn:
        problems.append(f"expected {model} to have an end-of-turn token (eos_token), found none")
    elif rendering.end_of_turn not in openings[3]:
        problems.append(
            f"expected {model} to end an assistant's turn with its eos_token {rendering.end_of_turn}, found "
            f"{openings[3][:40]!r}"
        )
    return problems


def _openings(text: str, places: Sequence[int]) -> Iterator[str]:
    """What stands before each message of the probe."""
    ends = [0, *(place + len(message["content"]) for place, message in zip(places, PROBE, strict=True))]
    yield from (text[start:place] for start, place in zip(ends, places, strict=False))

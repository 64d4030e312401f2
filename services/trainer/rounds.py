"""Which settings a role has in a round: what it starts from, what it is rewarded by, and the shape of its training.

Round 1 starts from the models of the settings. In each further round the proposer goes on from the proposer of the
round before, and so does the solver; the solver of the round before is the one that the new proposer writes for. The
settings of a role reach all processes of its training as variables (`shared.settings.as_environment`).
"""

from collections.abc import Mapping
from typing import Literal

from services.trainer.paths import RunPaths, run_paths
from services.trainer.records import HELD_OUT, TRAIN
from shared.command import UsageError
from shared.files import read_manifest
from shared.settings import Settings, changed

Role = Literal["proposer", "solver"]
TOOL_MARKUP_TOKENS = 64  # what chat template and last-turn note add to a search result
REJECTED = "rejected_"
REMEDIES = {
    "malformed": "train the proposer for longer (DRZERO_TRAINER__STEPS)",
    "not_answerable": "lower DRZERO_TRAINER__QUESTIONS__MIN_WITH_EVIDENCE",
    "known": "raise DRZERO_TRAINER__QUESTIONS__MAX_WITHOUT",
    "duplicate": "raise DRZERO_TRAINER__QUESTIONS__LIKENESS",
    "held_out_paper": "lower DRZERO_TRAINER__QUESTIONS__HELD_OUT_SHARE",
    "evaluation_paper": "ingest more papers that are in no evaluation set",
}


def proposer_settings(settings: Settings, number: int) -> Settings:
    """The settings of the proposer's part of round `number`; `solver.model` is the solver that it writes for."""
    changes = {
        "trainer.round": number,
        "trainer.role": "proposer",
        "trainer.actor.model": starting_model(settings, number, "proposer"),
        "solver.model": starting_model(settings, number, "solver"),
        "solver.in_place_of": settings.solver.model,
    }
    return changed(settings, changes)


def solver_settings(settings: Settings, number: int) -> Settings:
    """The settings of the solver's own training in round `number`, on the questions of that round.

    `solver.model` stays the one that the run began with. Turns, their lengths, worked examples and context are those of
    its attempts. Raises ArtifactError without questions and UsageError when there are too few.
    """
    reward, own = settings.trainer.reward, settings.trainer.solver
    questions = read_manifest(paths_of(settings, number, "solver").questions).counts
    train, held_out = questions[TRAIN], questions[HELD_OUT]
    if train < own.prompts_per_step or not held_out:
        raise UsageError(
            f"expected at least DRZERO_TRAINER__SOLVER__PROMPTS_PER_STEP = {own.prompts_per_step} verified questions "
            f"in round {number} and 1 that is kept out, found {train} and {held_out}; {remedy(settings, questions)}"
        )
    turns = reward.max_turns
    longest = turns * reward.max_new_tokens + (turns - 1) * (reward.max_tool_tokens + TOOL_MARKUP_TOKENS)
    # No sequence is longer than an attempt may be, nor than the memory plan, that of the proposer, has room for.
    room = min(settings.solver.context_tokens, settings.trainer.prompt_tokens + settings.trainer.response_tokens)
    response = max(1, min(longest, room - own.prompt_tokens))
    changes = {
        "trainer.round": number,
        "trainer.role": "solver",
        "trainer.actor.model": starting_model(settings, number, "solver"),
        "trainer.actor.learning_rate": own.learning_rate,
        # What does not fit the pool of the plan waits for a place.
        "trainer.actor.kv_tokens": settings.trainer.kv_tokens,
        "trainer.seeds": train,
        "trainer.eval_seeds": min(held_out, own.eval_questions),
        "trainer.steps": own.steps,
        "trainer.prompts_per_step": own.prompts_per_step,
        "trainer.rollouts_per_prompt": own.rollouts_per_prompt,
        "trainer.advantage": "grpo",
        "trainer.temperature": own.temperature,
        "trainer.prompt_tokens": own.prompt_tokens,
        "trainer.response_tokens": response,
        "trainer.max_turns": turns,
        "trainer.turn_tokens": reward.max_new_tokens,
        "trainer.max_tool_tokens": reward.max_tool_tokens,
        "trainer.worked_examples": reward.worked_examples,
        "trainer.guided_tool_call": False,
    }
    return changed(settings, changes)


def remedy(settings: Settings, counts: Mapping[str, int]) -> str:
    """What helps a round with these counts of questions, too few of them."""
    train, held_out = counts[TRAIN], counts[HELD_OUT]
    words = "raise DRZERO_TRAINER__QUESTIONS__PAPERS or DRZERO_TRAINER__QUESTIONS__CANDIDATES"
    if not held_out:
        words += " (one is kept out as soon as two papers have verified questions)"
    elif train:
        words += f", or lower DRZERO_TRAINER__SOLVER__PROMPTS_PER_STEP to {train}"
    rejected = {name: counts[REJECTED + name] for name in REMEDIES if counts.get(REJECTED + name)}
    if rejected:
        worst = max(rejected, key=rejected.__getitem__)
        words += (
            f"; {rejected[worst]} of {counts['candidates']} candidates were rejected as `{worst}`: {REMEDIES[worst]}"
        )
    return words


def paths_of(settings: Settings, number: int, role: Role) -> RunPaths:
    """The paths of a role's part of a round."""
    return run_paths(changed(settings, {"trainer.round": number, "trainer.role": role}))


def starting_model(settings: Settings, number: int, role: Role) -> str:
    """What a role starts from in a round: the model of the settings, or its weights of the round before."""
    if number == 1:
        return settings.trainer.actor.model if role == "proposer" else settings.solver.model
    return str(paths_of(settings, number - 1, role).weights)

"""One rollout of the proposer as verl makes it: our agent loop, our search tool and a real tokenizer.

Search is a real service on a socket. The engine is a stand-in that returns the token ids it was given and remembers
what it was asked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny_model import chat_tokenizer

from services.trainer.overrides import verl_overrides
from services.trainer.paths import run_paths
from services.trainer.protocol import SEARCH_TOOL, proposer_messages
from shared.records import Seed
from shared.settings import PREFIX, Settings, known_variables, load_settings

CALL = '<tool_call>\n{{"name": "search", "arguments": {{"query_list": ["{query}"]}}}}\n</tool_call>'
SEED = Seed(index=0, pmid="271", hop=2, document="Metformin activates AMPK in the liver.")


@dataclass
class Engine:
    """verl's client of the rollout servers, with the turns it will sample."""

    turns: Sequence[list[int]]
    prompts: list[list[int]] = field(default_factory=list)
    params: list[dict[str, Any]] = field(default_factory=list)

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> Any:
        """The next turn; like a real engine it never exceeds the budget."""
        from verl.workers.rollout.replica import TokenOutput

        ids = self.turns[len(self.prompts)][: sampling_params["max_tokens"]]
        self.prompts.append(list(prompt_ids))
        self.params.append(dict(sampling_params))
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), stop_reason="completed")


@contextmanager
def settings_in_force(folder: Path, **values: str) -> Iterator[Settings]:
    """Settings of the profile demo with `values` (names without the prefix), for everything in this process."""
    given = {"STORAGE__DATA_DIR": str(folder), "STORAGE__SCRATCH_DIR": str(folder), **values}
    with pytest.MonkeyPatch.context() as patch:
        for name in (f"{PREFIX}PROFILE", *known_variables()):
            patch.delenv(name, raising=False)
        for name, value in given.items():
            patch.setenv(PREFIX + name, value)
        load_settings.cache_clear()
        try:
            yield load_settings()
        finally:
            load_settings.cache_clear()


def verl_config(settings: Settings, model: str) -> Any:
    """verl's configuration for these settings, composed as verl composes it."""
    import hydra
    import verl

    overrides = verl_overrides(settings, run_paths(settings), model=model, resume_from=None)
    with hydra.initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return hydra.compose("ppo_trainer", overrides=[o for o in overrides if not o.startswith("hydra.")])


@dataclass(frozen=True, repr=False)
class World:
    """Everything a rollout needs but the engine."""

    settings: Settings
    config: Any
    tokenizer: Any

    async def roll_out(self, engine: Any, *, hop: int = SEED.hop) -> Any:
        """verl's output of one rollout; call it in the event loop that runs the engine."""
        from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
        from verl.tools.schemas import OpenAIFunctionToolSchema
        from verl.utils.dataset.rl_dataset import RLHFDataset

        from services.trainer.agent_loop import SearchAgentLoop
        from services.trainer.search_tool import SearchTool

        tool = SearchTool({"type": "native"}, OpenAIFunctionToolSchema.model_validate(SEARCH_TOOL))
        rollout = SearchAgentLoop(
            trainer_config=DictConfigWrap(self.config),
            server_manager=engine,
            tokenizer=self.tokenizer,
            processor=None,
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(self.config.data),
            hf_model_type="llama",
            tools=ToolListWrap([tool]),
        )
        messages = proposer_messages(SEED, "short-v1", 0)
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
        async with tool._client():  # closed with the rollout; verl's workers keep theirs for life
            return await rollout.run(sampling, raw_prompt=messages, extra_info={"hop": hop}, global_steps=1)

    def ids(self, text: str) -> list[int]:
        """The ids a tokenizer gives a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, markers included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


@contextmanager
def world(folder: Path, search: str, **values: str) -> Iterator[World]:
    """A world whose search service is at the address `search`."""
    tokenizer = chat_tokenizer()
    model = folder / "tokenizer"
    tokenizer.save_pretrained(model)
    given = {"RETRIEVAL__URL": search, "TRAINER__ACTOR__MODEL": str(model), **values}
    with settings_in_force(folder, **given) as settings:
        yield World(settings, verl_config(settings, str(model)), tokenizer)

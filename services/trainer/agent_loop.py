"""verl's multi-turn tool loop with what a search agent needs on top.

- ChatML models get ChatML turn boundaries, whatever their architecture is called.
- Under `guided_tool_call` the first turn of a prompt with more than one hop is decoded as a well-formed search call.
- Each turn has a token budget, and every turn also one of what is left of the response.
- An outage ends the rollout as an error; it is never shown to the model.
- What the reward needs to know travels as one JSON text: turns, searches, seed.

The sampled token ids are the ones that are trained on: verl merges ids, text is never tokenised again.
"""

import json
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.tool_agent_loop import AgentData, AgentState, ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.schemas import ToolResponse

from services.trainer.protocol import GUIDED_CALL, PARSER
from shared.clients import ServiceError
from shared.settings import load_settings
from shared.transcript import SearchCall, search_calls

CHATML_END = "<|im_end|>"
CHATML_TYPE = "qwen2"  # verl's name for models whose turns end with <|im_end|> and a newline


@ToolParser.register(PARSER)
class TranscriptParser(ToolParser):  # type: ignore[misc]
    """verl's parser seam on `shared.transcript`, so that loop and reward read calls alike."""

    async def extract_tool_calls(self, responses_ids: list[int], tools: Any = None) -> tuple[str, list[FunctionCall]]:
        """The turn's text and its well-formed calls; broken ones are found again by the reward."""
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        good = [call for call in search_calls(text) if not call.broken]
        return text, [FunctionCall(name="search", arguments=_arguments(call)) for call in good]


class SearchAgentLoop(ToolAgentLoop):  # type: ignore[misc]
    """One rollout of the proposer."""

    def __init__(self, *args: Any, tokenizer: Any, hf_model_type: str | None = None, **kwargs: Any) -> None:
        family = CHATML_TYPE if tokenizer.eos_token == CHATML_END else hf_model_type
        super().__init__(*args, tokenizer=tokenizer, hf_model_type=family, **kwargs)
        self._settings = load_settings().trainer
        self._turns: list[str] = []
        self._searches: list[dict[str, Any]] = []
        self._hop = 1

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Roll out one prompt; verl makes a fresh loop object for each."""
        self._hop = int(kwargs["extra_info"]["hop"])
        output = await super().run(sampling_params, **kwargs)
        trajectory = {
            "step": int(kwargs.get("global_steps", 0)),
            "turns": self._turns,
            "searches": self._searches,
            "prompt_tokens": len(output.prompt_ids),
            "response_tokens": len(output.response_ids),
            "trained_tokens": sum(output.response_mask),
        }
        output.extra_fields["trajectory"] = json.dumps(trajectory)
        return output

    async def _handle_generating_state(
        self, agent_data: AgentData, sampling_params: dict[str, Any], ignore_termination: bool = False
    ) -> AgentState:
        agent_data.searches = self._searches
        left = self.response_length - len(agent_data.response_mask)
        params = {**sampling_params, "max_tokens": max(1, min(self._settings.turn_tokens, left))}
        if self._settings.guided_tool_call and self._hop > 1 and agent_data.assistant_turns == 0:
            params["regex"] = GUIDED_CALL
        state = await super()._handle_generating_state(agent_data, params, ignore_termination)
        self._turns.append(self.tokenizer.decode(agent_data.response_ids, skip_special_tokens=True))
        return state

    async def _call_tool(
        self, tool_call: FunctionCall, tools_kwargs: dict[str, Any], agent_data: AgentData
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        # verl's own version turns every exception into a text for the model, outages included.
        tool = self.tools[tool_call.name]
        try:
            return await tool.execute("", json.loads(tool_call.arguments), agent_data=agent_data)  # type: ignore[no-any-return]
        except ServiceError as error:
            raise RuntimeError(f"rollout lost: {error}") from error


def _arguments(call: SearchCall) -> str:
    return json.dumps({"query_list": list(call.queries)})

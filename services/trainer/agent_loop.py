"""verl's multi-turn tool loop with what a search agent needs on top.

- ChatML models get ChatML turn boundaries, whatever their architecture is called.
- Under `guided_tool_call` the first turn of a prompt with more than one hop is decoded as a well-formed search call.
- Each turn has a token budget, and every turn also one of what is left of the response. Search results are cut so that
  a last turn still fits, and the model is told when its last turn has come.
- A search that the service did not answer ends the rollout as lost, which makes it invalid; the outage is never shown
  to the model as if it were a result.
- So does the deadline of the rollout: after it neither turn nor search begins, and one in flight is cut off.
- What the reward needs to know travels as one JSON text: turns, searches, what was lost, and where the time went.

The sampled token ids are the ones that are trained on: verl merges ids, text is never tokenised again.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.tool_agent_loop import AgentData, AgentState, ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.schemas import ToolResponse

from services.trainer.protocol import DEADLINE, GUIDED_CALL, PARSER, last_turn_note
from shared.clients import ServiceError
from shared.settings import load_settings
from shared.transcript import SearchCall, search_calls

CHATML_END = "<|im_end|>"
CHATML_TYPE = "qwen2"  # verl's name for models whose turns end with <|im_end|> and a newline
FINAL_TURN_TOKENS = 128  # kept free for a question and its answer
RESULT_MARKUP_TOKENS = 64  # what chat template and last-turn note add to a search result


@ToolParser.register(PARSER)
class TranscriptParser(ToolParser):  # type: ignore[misc]
    """verl's parser seam on `shared.transcript`, so that loop and reward read calls alike."""

    async def extract_tool_calls(self, responses_ids: list[int], tools: Any = None) -> tuple[str, list[FunctionCall]]:
        """The turn's text and its well-formed calls; broken ones are found again by the reward."""
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        good = [call for call in search_calls(text) if not call.broken]
        return text, [FunctionCall(name="search", arguments=_arguments(call)) for call in good]


class SearchAgentLoop(ToolAgentLoop):  # type: ignore[misc]
    """One rollout of the role that is trained."""

    def __init__(self, *args: Any, tokenizer: Any, hf_model_type: str | None = None, **kwargs: Any) -> None:
        family = CHATML_TYPE if tokenizer.eos_token == CHATML_END else hf_model_type
        super().__init__(*args, tokenizer=tokenizer, hf_model_type=family, **kwargs)
        self._settings = load_settings().trainer
        self._turns: list[str] = []
        self._searches: list[dict[str, Any]] = []
        self._hop = 1
        self._lost = ""
        self._deadline = 0.0  # in the event loop's time
        self._seconds = {"generating": 0.0, "searching": 0.0}

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Roll out one prompt; verl makes a fresh loop object for each."""
        self._hop = int(kwargs["extra_info"]["hop"])
        self._deadline = asyncio.get_running_loop().time() + self._settings.rollout_deadline_s
        step = int(kwargs.get("global_steps", 0))
        output = await super().run(sampling_params, **kwargs)
        for bound in ("min_global_steps", "max_global_steps"):
            # A rollout without a turn has none from the engine, and verl counts with them.
            output.extra_fields.setdefault(bound, max(0, step - 1))
        trajectory = {
            "rollout": uuid.uuid4().hex,
            "step": step,
            "turns": self._turns,
            "searches": self._searches,
            "lost": self._lost,
            "seconds_generating": round(self._seconds["generating"], 3),
            "seconds_searching": round(self._seconds["searching"], 3),
            "generated": time.time(),
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
        turn = partial(super()._handle_generating_state, agent_data, params, ignore_termination)
        state = await self._until_deadline(agent_data, "generating", turn)
        if not self._lost:
            self._turns.append(self.tokenizer.decode(agent_data.response_ids, skip_special_tokens=True))
        return state

    async def _handle_processing_tools_state(self, agent_data: AgentData) -> AgentState:
        calls = partial(super()._handle_processing_tools_state, agent_data)
        try:
            return await self._until_deadline(agent_data, "searching", calls)
        except ServiceError:
            return self._lose(agent_data, "search")

    async def _until_deadline(
        self, agent_data: AgentData, doing: str, work: Callable[[], Awaitable[AgentState]]
    ) -> AgentState:
        """The state after `work`, whose time is added up; a lost rollout when it would begin or last too late."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        if began >= self._deadline:
            return self._lose(agent_data, DEADLINE)
        try:
            async with asyncio.timeout_at(self._deadline) as limit:
                return await work()
        except TimeoutError:
            if not limit.expired():  # somebody else's
                raise
            return self._lose(agent_data, DEADLINE)
        finally:
            self._seconds[doing] += loop.time() - began

    def _lose(self, agent_data: AgentData, reason: str) -> AgentState:
        """End the rollout here as invalid."""
        self._lost = reason
        if not agent_data.response_mask:
            # verl takes the last len(response_mask) ids for the response: of none that would be the whole prompt. Its
            # batches know no empty rows either, so the response is one token that was never sampled.
            agent_data.prompt_ids = [*agent_data.prompt_ids, self.tokenizer.eos_token_id]
            agent_data.response_mask = [0]
            agent_data.response_logprobs = [0.0]
        return AgentState.TERMINATED

    async def _call_tool(
        self, tool_call: FunctionCall, tools_kwargs: dict[str, Any], agent_data: AgentData
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        # verl's own version turns every exception into a text for the model, outages included.
        tool = self.tools[tool_call.name]
        calls = agent_data.tool_calls[: self.max_parallel_calls]
        room, last = self._room(agent_data, len(calls))
        note = last_turn_note(self._settings.role) if last and tool_call is calls[-1] else ""
        arguments = json.loads(tool_call.arguments)
        return await tool.execute("", arguments, agent_data=agent_data, room=room, note=note)  # type: ignore[no-any-return]

    def _room(self, agent_data: AgentData, calls: int) -> tuple[int, bool]:
        """Tokens for each result of this turn's calls, and whether the next turn is the last one."""
        final = min(self._settings.turn_tokens, FINAL_TURN_TOKENS)
        left = self.response_length - len(agent_data.response_mask) - final
        room = max(0, min(self._settings.max_tool_tokens, left // calls - RESULT_MARKUP_TOKENS))
        after = left - calls * (room + RESULT_MARKUP_TOKENS)
        no_more_turns = agent_data.assistant_turns >= self.max_assistant_turns - 1
        return room, no_more_turns or after < final + RESULT_MARKUP_TOKENS + self._settings.max_tool_tokens


def _arguments(call: SearchCall) -> str:
    return json.dumps({"query_list": list(call.queries)})

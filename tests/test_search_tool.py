"""verl's search tool and reader of tool calls, as the rollout uses them: real verl classes, live service."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_services import search_reply, serving
from tiny_model import tiny_tokenizer

from services.trainer.protocol import SEARCH_TOOL
from shared.clients import Unavailable
from shared.settings import build_settings

# verl and what it imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tool_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes verl's tool for a search service at an address."""
    pytest.importorskip("verl", reason="needs the trainer's packages")
    from verl.tools.schemas import OpenAIFunctionToolSchema

    from services.trainer import search_tool

    def make(address: str) -> Any:
        settings = build_settings(
            {
                "DRZERO_RETRIEVAL__URL": address,
                "DRZERO_TRAINER__PATIENCE_S": "0.4",
                "DRZERO_TRAINER__ACTOR__MODEL": str(tmp_path),
            }
        )
        tiny_tokenizer().save_pretrained(tmp_path)
        monkeypatch.setattr(search_tool, "load_settings", lambda: settings)
        return search_tool.SearchTool({"type": "native"}, OpenAIFunctionToolSchema.model_validate(SEARCH_TOOL))

    return make


async def look_up(tool: Any, rollout: Any, *, room: int, note: str = "") -> Any:
    """One search for "ampk"; the tool's connections are closed."""
    async with tool._client():
        return await tool.execute("", {"query_list": ["ampk"]}, agent_data=rollout, room=room, note=note)


def test_the_model_reads_pmids_and_the_rollout_remembers_them(tool_at: Any) -> None:
    rollout = SimpleNamespace(searches=[])

    def search(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return search_reply(body["queries"], "31415")

    with serving(search) as address:
        tool = tool_at(address)
        reply, reward, _ = asyncio.run(look_up(tool, rollout, room=200, note="Last turn."))
    assert "PMID 31415" in reply.text
    assert reward == 0
    text = reply.text.removesuffix("\n\nLast turn.")
    assert rollout.searches == [{"queries": ["ampk"], "pmids": ["31415"], "text": text}]
    assert "Last turn" not in text


def test_an_outage_is_raised_and_never_told_to_the_model(tool_at: Any) -> None:
    rollout = SimpleNamespace(searches=[])
    with pytest.raises(Unavailable, match="retrieval"):
        asyncio.run(look_up(tool_at("http://127.0.0.1:9"), rollout, room=9))
    assert rollout.searches == []


def test_a_paper_that_did_not_fit_was_not_found(tool_at: Any) -> None:
    rollout = SimpleNamespace(searches=[])
    with serving(lambda _, body: search_reply(body["queries"], "31415")) as address:
        asyncio.run(look_up(tool_at(address), rollout, room=0))
    assert rollout.searches == [{"queries": ["ampk"], "pmids": [], "text": ""}]


def test_verl_gets_the_well_formed_calls_of_a_turn_and_no_other() -> None:
    pytest.importorskip("verl", reason="needs the trainer's packages")
    from verl.experimental.agent_loop.tool_parser import ToolParser

    from services.trainer.agent_loop import PARSER

    tokenizer = tiny_tokenizer()
    good = json.dumps({"name": "search", "arguments": {"query_list": ["tp53"]}})
    text = f"<think>x</think><tool_call>{good}</tool_call><tool_call>oops</tool_call>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    content, calls = asyncio.run(ToolParser.get_tool_parser(PARSER, tokenizer).extract_tool_calls(ids))
    assert content == text
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("search", {"query_list": ["tp53"]})]

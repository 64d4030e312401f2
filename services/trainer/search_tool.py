"""verl's `search` tool: the model's queries → papers of the search service → text with PMIDs.

verl makes one object per worker and calls `execute` per tool call. What was found is kept with the trajectory
(`agent_data.searches`), because the reward must know what the model could read. An outage is raised, not told to the
model as if it were a result.
"""

import asyncio
from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse

from services.trainer.protocol import render_results
from services.trainer.tokens import Tokens
from shared.clients import SearchClient
from shared.model_files import resolve_model
from shared.settings import load_settings


class SearchTool(BaseTool):  # type: ignore[misc]
    """`search(query_list)` against the retrieval service."""

    def __init__(self, config: dict[str, Any], tool_schema: Any) -> None:
        super().__init__(config, tool_schema)
        settings = load_settings()
        self._trainer = settings.trainer
        self._url = settings.retrieval.url
        self._tokens = Tokens(resolve_model(settings.trainer.actor.model, settings))
        self._clients: dict[asyncio.AbstractEventLoop, SearchClient] = {}

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        """Search for `parameters["query_list"]`; raises shared.clients.ServiceError when the service stays away.

        The text is cut to `kwargs["room"]` tokens; `kwargs["note"]` is written below it. A paper that did not fit was
        not found.
        """
        queries: list[str] = parameters["query_list"]
        results = await self._client().search(queries, self._trainer.search_top_k)
        text = render_results(queries, results, self._tokens.cut, kwargs["room"])
        found = [hit.paper.pmid for hits in results for hit in hits if f"PMID {hit.paper.pmid}:" in text]
        kwargs["agent_data"].searches.append({"queries": queries, "pmids": found, "text": text})
        return ToolResponse(text="\n\n".join(filter(None, [text, kwargs["note"]]))), 0.0, {}

    def _client(self) -> SearchClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = SearchClient(self._url, patience_s=self._trainer.patience_s)
        return self._clients[loop]

"""Requests made from the OpenAPI document: none is a 5xx, and every reply is as the document says.

Bounded to a few seconds an endpoint. A deadline that a request makes too short for itself is the one 503.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from retrieval_world import WordSearcher, serving, settings_for, until_ready
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from services.retrieval.app import create_app

ENDPOINTS = (
    "POST /search",
    "POST /retrieve",
    "GET /documents/{pmid}",
    "GET /similar/{pmid}",
    "GET /info",
    "GET /health",
    "GET /ready",
    "GET /metrics",
)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    app = create_app(settings_for(tmp_path_factory.mktemp("none")), open_searcher=lambda _: WordSearcher())
    with serving(app) as url:
        asyncio.run(until_ready(url))
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        yield {found.ok().label: found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)}


def test_every_endpoint_of_the_document_is_tried(operations: dict[str, Any]) -> None:
    assert set(operations) == set(ENDPOINTS)


@pytest.mark.parametrize("label", ENDPOINTS)
def test_no_request_is_a_5xx_and_every_reply_is_as_documented(operations: dict[str, Any], label: str) -> None:
    operation = operations[label]
    cases = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if operation.body or operation.query or operation.path_parameters:
        cases = st.one_of(cases, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def check(case: schemathesis.Case[Any]) -> None:
        response = case.call()
        too_late = response.status_code == 503 and "no answer within" in response.text
        assert response.status_code < 500 or too_late, response.text
        case.validate_response(response, excluded_checks=[not_a_server_error])

    check()

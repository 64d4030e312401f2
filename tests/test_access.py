"""The API token: who is let in where, what a browser's page of elsewhere may ask, and where the token never stands."""

import asyncio
import base64
import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from corpora import publish_corpus
from hypothesis import given
from hypothesis import strategies as st
from model_services import serve
from retrieval_world import PAPERS, WordSearcher, environment, needs_minilm, serving, settings_for

from services.retrieval.app import create_app
from shared.access import Hidden, api_token, exposed, presented, token_headers
from shared.clients import Refused, SearchClient
from shared.settings import SettingsError, build_settings

ROOT = Path(__file__).parents[1]
TOKEN = "planted-0123456789abcdef"  # noqa: S105
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()}


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("DRZERO_API_TOKEN", TOKEN)
    app = create_app(settings_for(tmp_path), open_searcher=lambda *_, **__: WordSearcher())
    with serving(app) as url:
        yield url

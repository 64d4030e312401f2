"""The documentation: it builds with every link; its settings and endpoints are those of the code."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from retrieval_world import settings_for
from starlette.routing import Route

from services.retrieval.app import create_app as search_app
from services.solver.server import create_app as solver_app
from shared.settings import SolverSettings

ROOT = Path(__file__).parents[1]
MADE_BY_FASTAPI = {"/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc"}


def test_the_settings_page_is_that_of_the_settings() -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DRZERO_")}
    made = subprocess.run(
        [sys.executable, "-m", "shared.settings_table", "--markdown"],
        cwd=ROOT, env=clean, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert (ROOT / "docs" / "settings.md").read_text() == made.stdout, "make settings-page"


def test_the_site_builds_with_every_link(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).with_name("mkdocs")
    if not mkdocs.is_file():
        pytest.skip("mkdocs is not installed beside this Python")
    command = [str(mkdocs), "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.parent.name for path in (tmp_path / "site").glob("*/index.html")} >= pages - {"index"}
    home = (tmp_path / "site" / "index.html").read_text()
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"https?://", home)  # nothing from elsewhere
    shutil.rmtree(tmp_path / "site")


def listed(section: str) -> set[tuple[str, str]]:
    """Method and path of each request in a section of the page of HTTP interfaces."""
    page = (ROOT / "docs" / "http-api.md").read_text()
    part = page.split(f"## {section}", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"^\| `(GET|POST) ([^`]+)`", part, re.MULTILINE))


def served(routes: Iterable[object]) -> set[tuple[str, str]]:
    """Method and path of each route of an app, those of included routers among them."""
    flat = [inner for route in routes for inner in getattr(getattr(route, "original_router", None), "routes", [route])]
    return {
        (method, route.path)
        for route in flat
        if isinstance(route, Route) and route.path not in MADE_BY_FASTAPI
        for method in (route.methods or ()) - {"HEAD"}
    }


def test_the_search_services_endpoints_are_all_listed(tmp_path: Path) -> None:
    assert listed("Search") == served(search_app(settings_for(tmp_path)).routes)


def test_the_solvers_endpoints_are_all_listed() -> None:
    assert listed("Solver") == served(solver_app(SolverSettings(), "nowhere").routes)

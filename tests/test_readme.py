"""README and docs against the disk: the tree, the make targets, the variables, the stages and the prompts they name."""

import re
from pathlib import Path

import pytest

from services.trainer.__main__ import STAGES
from shared.settings import SECRETS, known_variables, profiles

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".env.example", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDER = "DRZERO_SECTION__FIELD"
PROMPTS = sorted(path for path in (ROOT / "services/trainer/prompts").rglob("*") if path.is_file())
LISTED_WHOLE = ("services", "shared")  # of other folders the tree shows the name only


def listed() -> dict[str, str]:
    """Paths of README's tree (folders end with a slash) and what is said of each. Two spaces of indent are a level."""
    block = README.split("## The tree", 1)[1].split("```text\n", 1)[1].split("```", 1)[0]
    folders: list[str] = []
    entries: dict[str, str] = {}
    for line in block.splitlines():
        name, _, words = line.strip().partition(" ")
        level = (len(line) - len(line.lstrip())) // 2
        folders[level:] = [name]
        path = "".join(folders)
        assert path not in entries, f"{path} is listed twice"
        entries[path] = words.strip()
    return entries


def files_on_disk() -> set[str]:
    paths = (path for top in LISTED_WHOLE for path in (ROOT / top).rglob("*"))
    return {
        str(path.relative_to(ROOT))
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def code_of(text: str) -> str:
    """What stands in fences and backticks."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


def test_tree_lists_exactly_the_files_of_services_and_shared() -> None:
    shown = {path for path in listed() if path.startswith(LISTED_WHOLE) and not path.endswith("/")}
    assert shown == files_on_disk()


def test_tree_lists_the_top_level() -> None:
    shown = {path.rstrip("/") for path in listed() if "/" not in path.rstrip("/")}
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    # Hidden ones are only asked for when the tree names them: tools leave caches and folders of their own.
    there = {path.name for path in ROOT.iterdir() if path.name not in ignored and not path.name.startswith(".")}
    assert there <= shown
    assert [name for name in shown if not (ROOT / name).exists()] == []


def test_every_entry_of_the_tree_has_a_few_words() -> None:
    assert [path for path, words in listed().items() if not 0 < len(words) < 100] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_named_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    calls = re.findall(r"\bmake((?: [a-z][a-z0-9-]*)+)", code_of(page.read_text(encoding="utf-8")))
    assert {name for call in calls for name in call.split()} <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_named_variables_exist(page: Path) -> None:
    named = set(re.findall(r"DRZERO(?:_+[A-Z0-9]+)+", page.read_text(encoding="utf-8")))
    assert named - {PLACEHOLDER} <= known_variables().keys() | SECRETS


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_named_settings_exist(page: Path) -> None:
    known = {".".join(path) for path in known_variables().values()}
    sections = "|".join({name.partition(".")[0] for name in known if "." in name})
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)`", page.read_text(encoding="utf-8")))
    assert named <= known


def test_stage_table_has_all_stages_in_order() -> None:
    table = README.split("The stages of a round, in order", 1)[1].split("docs/rounds.md", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(STAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_named_stages_and_modules_exist(page: Path) -> None:
    code = code_of(page.read_text(encoding="utf-8"))
    stages = set(re.findall(r"--(?:from|to) (?:\d\.)?([a-z_]+)", code))
    assert stages <= STAGES.keys()
    modules = [name.rstrip(".") for name in re.findall(r"-m ((?:services|shared)[a-z_.]+)", code)]
    for place in (ROOT / name.replace(".", "/") for name in modules):
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), place


def test_profile_table_has_all_profiles() -> None:
    table = README.split("## Settings", 1)[1].split("##", 1)[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == profiles()


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda path: path.name)
def test_algorithm_page_shows_the_prompts_as_they_are(prompt: Path) -> None:
    page = (ROOT / "docs/algorithm.md").read_text(encoding="utf-8")
    assert f"```text\n{prompt.read_text(encoding='utf-8').rstrip()}\n```" in page

"""Settings: every profile parses, every wrong value or name is one sentence that names its variable."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from shared.settings import Settings, SettingsError, build_settings, known_variables, profiles, read_profile
from shared.settings_table import show, table

ROOT = Path(__file__).parents[1]


def fields(section: type[BaseModel], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every settable field by its path, found without the code under test."""
    found: dict[tuple[str, ...], Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= fields(kind, (*path, name))
        else:
            found[(*path, name)] = field
    return found


def problem(**variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        build_settings({f"DRZERO_{name}": value for name, value in variables.items()})
    return str(caught.value)


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [
        leaf
        for key, value in values.items()
        for leaf in (leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)])
    ]


@pytest.mark.parametrize("name", profiles())
def test_every_shipped_profile_parses_and_sets_only_what_exists(name: str) -> None:
    settings = build_settings({"DRZERO_PROFILE": name})
    assert settings.profile == name
    assert set(leaves(read_profile(name))) <= set(fields(Settings))


def test_the_three_profiles_are_shipped_and_demo_is_the_default() -> None:
    assert profiles() == ["a100x1", "a100x8", "demo", "rtx24"]
    assert build_settings({}).profile == "demo"


def test_an_unknown_profile_lists_the_known_ones() -> None:
    assert problem(PROFILE="dmeo") == "DRZERO_PROFILE is 'dmeo': expected one of a100x1, a100x8, demo, rtx24"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("TRAINER__STEP", "TRAINER__STEPS"),
        ("INGEST_XML_DIR", "INGEST__XML_DIR"),
        ("RETREIVAL__PORT", "RETRIEVAL__PORT"),
        ("TRAINER__REWARD__ATEMPTS", "TRAINER__REWARD__ATTEMPTS"),
    ],
)
def test_a_misspelt_variable_is_named_with_the_one_that_was_meant(given: str, meant: str) -> None:
    assert problem(**{given: "1"}) == f"unknown variable DRZERO_{given}; did you mean DRZERO_{meant}?"


def test_a_variable_like_no_other_is_named_with_the_command_that_lists_all() -> None:
    assert problem(XYZZY="1") == "unknown variable DRZERO_XYZZY; `make settings` lists all"


def test_a_section_is_no_setting() -> None:
    assert "unknown variable DRZERO_TRAINER" in problem(TRAINER="{}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RETRIEVAL__PORT", "0"),
        ("SOLVER__PORT", "65536"),
        ("TRAINER__PORT", "http"),
        ("TRAINER__STEPS", "0"),
        ("TRAINER__STEPS", "3.5"),
        ("TRAINER__RUN", "../elsewhere"),
        ("TRAINER__PATIENCE_S", "inf"),
        ("TRAINER__TEMPERATURE", "nan"),
        ("TRAINER__HOP_RATIO", "4,3"),
        ("TRAINER__HOP_RATIO", "4,3,x,1"),
        ("TRAINER__HOP_RATIO", "4,3,2,-1"),
        ("TRAINER__HOP_RATIO", "[4, 3]"),
        ("TRAINER__ROUND", "0"),
        ("TRAINER__ROLE", "judge"),
        ("TRAINER__SOLVER__ROLLOUTS_PER_PROMPT", "1"),
        ("TRAINER__QUESTIONS__HELD_OUT_SHARE", "0"),
        ("TRAINER__ACTOR__DEVICE", "tpu"),
        ("TRAINER__MAX_INVALID_SHARE", "1.5"),
        ("TRAINER__REWARD__ATTEMPTS", "1"),
        ("INGEST__STRICT", "perhaps"),
        ("INGEST__DATE_FROM", "2021-13-01"),
        ("LOG__LEVEL", "loud"),
        ("SOLVER__URL", "localhost:8001"),
        ("INGEST__ENTREZ_URL", "ftp://ncbi"),
        ("STORAGE__MIN_FREE_GB", "-1"),
    ],
)
def test_a_bad_value_is_one_line_that_names_value_and_variable(name: str, value: str) -> None:
    text = problem(**{name: value})
    assert f"(variable DRZERO_{name})" in text
    assert "\n" not in text
    assert any(repr(part) in text or part in text for part in value.split(","))


def test_all_bad_values_are_named_at_once() -> None:
    text = problem(RETRIEVAL__PORT="0", TRAINER__STEPS="x")
    assert "DRZERO_RETRIEVAL__PORT" in text
    assert "DRZERO_TRAINER__STEPS" in text


def test_a_rule_over_two_settings_names_both_and_dumps_nothing() -> None:
    text = problem(TRAINER__SEEDS="1", TRAINER__PROMPTS_PER_STEP="4")
    assert text == "trainer.seeds is 1, but one step takes trainer.prompts_per_step = 4"


def test_a_hop_ratio_that_draws_nothing_is_refused() -> None:
    assert "trainer.hop_ratio is 0,0,0,0" in problem(TRAINER__HOP_RATIO="0,0,0,0")


def test_an_empty_variable_is_unset() -> None:
    given = dict.fromkeys(known_variables(), "")
    assert build_settings(given) == build_settings({})


def test_variables_win_over_the_profile_and_the_profile_over_defaults() -> None:
    assert build_settings({"DRZERO_PROFILE": "a100x1"}).trainer.seeds == 1600
    settings = build_settings({"DRZERO_PROFILE": "a100x1", "DRZERO_TRAINER__SEEDS": "77"})
    assert (settings.trainer.seeds, settings.trainer.steps) == (77, 50)
    assert build_settings({"DRZERO_TRAINER__HOP_RATIO": "1,0,0,2"}).trainer.hop_ratio == (1, 0, 0, 2)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Sepsis,Asthma", ("Sepsis", "Asthma")),
        ('["Diabetes Mellitus, Type 2", "Sepsis"]', ("Diabetes Mellitus, Type 2", "Sepsis")),
        ("[]", ()),
        ("[Sepsis,Asthma", ("[Sepsis", "Asthma")),
    ],
)
def test_a_list_is_written_with_commas_or_as_json(text: str, terms: tuple[str, ...]) -> None:
    assert build_settings({"DRZERO_TRAINER__SEED_MESH": text}).trainer.seed_mesh == terms


def test_other_programs_variables_are_left_alone() -> None:
    assert build_settings({"PATH": "/bin", "DRZ": "1", "NCBI_API_KEY": "k"}) == build_settings({})


def test_every_field_has_a_variable_and_a_sentence() -> None:
    assert set(known_variables().values()) == set(fields(Settings))
    for path, field in fields(Settings).items():
        assert re.search(r"[.)]$", field.description or ""), path


def test_no_setting_holds_a_secret() -> None:
    secret = re.compile(r"(^|_)(key|token|password|passwd|secret|credentials?)(_|$)")
    assert [path for path in fields(Settings) if secret.search(path[-1])] == []


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        build_settings({}).trainer.steps = 5  # type: ignore[misc]


def test_the_list_has_every_variable_with_its_value_in_force() -> None:
    text = table(build_settings({"DRZERO_TRAINER__STEPS": "7"}))
    assert set(re.findall(r"^(DRZERO_\w+)=", text, re.MULTILINE)) == set(known_variables())
    assert "DRZERO_TRAINER__STEPS=7   (default 50)\n    int, ≥ 1. Optimizer steps." in text
    assert "DRZERO_LOG__FORMAT=auto\n    one of auto, json, console." in text


def test_the_list_leaves_out_the_password_of_an_address() -> None:
    assert show("redis://me:hunter2@host:6379/0") == "redis://…@host:6379/0"
    assert show("http://127.0.0.1:8000") == "http://127.0.0.1:8000"


def test_a_misspelt_variable_does_not_hide_the_list() -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DRZERO_")} | {"DRZERO_TRAINER__STEP": "1"}
    command = [sys.executable, "-m", "shared.settings_table"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "DRZERO_TRAINER__STEPS=50" in done.stdout
    assert done.stderr.startswith(
        "settings: unknown variable DRZERO_TRAINER__STEP; did you mean DRZERO_TRAINER__STEPS?"
    )


def test_a_redis_address_needs_its_scheme() -> None:
    assert "DRZERO_REDIS__URL" in problem(REDIS__URL="localhost:6379")


def test_rollouts_may_not_ask_for_more_papers_than_are_served() -> None:
    text = problem(TRAINER__SEARCH_TOP_K="9", RETRIEVAL__TOP_K_MAX="5")
    assert "retrieval.top_k_max is 5" in text
    assert "asks for 9" in text

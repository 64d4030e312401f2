"""The alert rules: each fires in its condition and is silent in health (tests/alerts/), and the docs say what it means.

promtool and amtool are Debian's (`apt install prometheus prometheus-alertmanager`).
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RULES = sorted((ROOT / "monitoring/rules").glob("*.yml"))
PAGE = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
NEVER, ALWAYS = "vector(0) > 1", 'label_replace(vector(1), "job", "any", "", "")'

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)"
)


def alerts_of(path: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


ALERTS = [(path, rule) for path in RULES for rule in alerts_of(path)]


def promtool(*arguments: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def altered(target: Path, path: Path, expression: str) -> Path:
    """Rules and their tests below `target`, with this expression in every alert of a file, which fires at once."""
    for folder in ("monitoring/rules", "tests/alerts"):
        shutil.copytree(ROOT / folder, target / folder)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for rule in (rule for group in content["groups"] for rule in group["rules"] if "alert" in rule):
        rule.pop("for", None)
        rule["expr"] = expression
    (target / "monitoring/rules" / path.name).write_text(yaml.safe_dump(content), encoding="utf-8")
    return target


@needs_promtool
def test_prometheus_accepts_configuration_and_rules() -> None:
    done = promtool("check", "config", "monitoring/prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("path", sorted((ROOT / "tests/alerts").glob("*.yml")), ids=lambda path: path.stem)
def test_alerts_fire_in_their_condition_and_are_silent_in_health(path: Path) -> None:
    done = promtool("test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("expression", [NEVER, ALWAYS], ids=["never", "always"])
@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_an_alert_that_never_or_always_fired_would_fail_its_tests(path: Path, expression: str, tmp_path: Path) -> None:
    done = promtool("test", "rules", f"tests/alerts/{path.name}", folder=altered(tmp_path, path, expression))
    assert done.returncode != 0
    failed = set(re.findall(r'alertname=\\?"(\w+)', done.stdout + done.stderr))
    assert failed == {rule["alert"] for rule in alerts_of(path)}


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed (Debian's prometheus-alertmanager)")
def test_alertmanager_accepts_its_configuration() -> None:
    command = ["amtool", "check-config", "monitoring/alertmanager.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("path", "rule"), ALERTS, ids=[rule["alert"] for _, rule in ALERTS])
def test_the_docs_have_each_alert_with_its_meaning_and_the_first_thing_to_do(path: Path, rule: dict[str, Any]) -> None:
    told = rule["annotations"]
    row = f"| {rule['alert']} | {rule['labels']['severity']} | {told['description']} | {told['action']} |"
    assert row in PAGE
    page, _, anchor = told["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_docs_have_no_alert_that_is_not_there() -> None:
    rows = re.findall(r"^\| (\w+) \| (?:warning|critical) \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(rule["alert"] for _, rule in ALERTS)

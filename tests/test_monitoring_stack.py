"""The containers of the monitoring overlays, as Compose understands them; none is started.

Their images cannot be pulled where the tests run: what is inside is tested with Debian's binaries (test_prometheus.py).
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("compose.yaml", "compose.gpu.yaml", "compose.monitoring.yaml", "compose.monitoring.gpu.yaml")
MONITORS = ("prometheus", "alertmanager", "grafana", "redis-exporter", "cadvisor", "dcgm-exporter")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("expected Docker's Compose v2 plugin to read the overlays, found none")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DRZERO_", "COMPOSE_"))}
    files = [word for name in FILES for word in ("-f", name)]
    command = ["docker", "compose", "--env-file", os.devnull, *files, "config", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


@pytest.mark.parametrize("name", MONITORS)
def test_a_monitor_can_do_little_and_is_reached_from_this_machine_only(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["mem_limit"]) <= 2**30
    assert not service.get("privileged")
    assert not service.get("cap_add")
    assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}


@pytest.mark.parametrize("name", MONITORS)
def test_an_image_is_pinned_by_its_version(services: dict[str, Any], name: str) -> None:
    assert re.search(r":v?\d+\.\d+\.\d+", services[name]["image"])


@pytest.mark.parametrize("name", MONITORS)
def test_what_is_mounted_is_there_and_only_data_can_be_written(services: dict[str, Any], name: str) -> None:
    for mount in services[name].get("volumes", []):
        if mount["type"] == "bind":
            assert mount["read_only"], mount["source"]
            source = Path(mount["source"])
            assert source.exists() or ROOT not in source.parents
        else:
            assert mount["source"] == name


def test_only_cadvisor_sees_the_machine_and_it_publishes_no_port(services: dict[str, Any]) -> None:
    outside = {
        name
        for name in MONITORS
        for mount in services[name].get("volumes", [])
        if mount["type"] == "bind" and ROOT not in Path(mount["source"]).parents
    }
    assert outside == {"cadvisor"}
    assert "ports" not in services["cadvisor"]


def test_grafana_has_no_login_and_no_administrator(services: dict[str, Any]) -> None:
    environment = services["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert (
        environment["GF_AUTH_DISABLE_LOGIN_FORM"] == environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    )
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert not [name for name in environment if "PASSWORD" in name]


def test_prometheus_scrapes_every_service_and_exporter_by_its_name(services: dict[str, Any]) -> None:
    text = (ROOT / "monitoring/prometheus.yml").read_text(encoding="utf-8")
    targets = set(re.findall(r'"([a-z-]+):\d+"', text)) | set(re.findall(r"names: \[([a-z-]+)\]", text))
    silent = {
        "ingest",
        "index",
        "redis",
        "grafana",
        "prometheus",
    }  # jobs that end, Redis by its exporter, Prometheus itself
    assert targets - {"localhost"} == services.keys() - silent


def test_the_examples_of_alertmanager_are_valid(tmp_path: Path) -> None:
    if shutil.which("amtool") is None:
        pytest.skip("amtool is not installed (Debian's package prometheus-alertmanager)")
    text = (ROOT / "monitoring/alertmanager.yml").read_text(encoding="utf-8")
    for receiver in ("mail", "slack", "webhook"):
        filled = text.replace("\n#  ", "\n  ").replace("receiver: none", f"receiver: {receiver}")
        (tmp_path / "alertmanager.yml").write_text(filled, encoding="utf-8")
        command = ["amtool", "check-config", str(tmp_path / "alertmanager.yml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

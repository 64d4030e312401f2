"""What GPU images are built from: Compose's GPU overlay, the Dockerfile's stages, and pins that resolve and install.

The overlay needs the Compose plugin but no engine; nothing here needs a GPU. What asks a package registry is `slow`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SERVICES = ("retrieval", "solver", "trainer")
INSTALLED_GB = 10  # what the trainer's GPU packages take unpacked
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# The platform of the GPU images: Ubuntu 24.04's Python and C library.
PLATFORM = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_35")


def pins(path: Path) -> dict[str, str]:
    """Package → version of a requirements file."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def gpu_pins(service: str) -> dict[str, str]:
    return pins(ROOT / f"services/{service}/requirements-gpu.txt")


def project(**variables: str) -> dict[str, Any]:
    """The services of compose.yaml with compose.gpu.yaml, as Compose understands them."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("expected Docker's Compose v2 plugin to read the overlay, found none")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DRZERO_", "COMPOSE_"))} | variables
    command = ["docker", "compose", "--env-file", os.devnull, "-f", "compose.yaml", "-f", "compose.gpu.yaml"]
    done = subprocess.run(
        [*command, "config", "--format", "json"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@pytest.mark.parametrize("gpus", ["1", "2", "8"])
def test_the_overlay_reserves_as_many_gpus_as_asked(gpus: str) -> None:
    services = project(DRZERO_GPUS=gpus)
    for name in ("index", *SERVICES):
        [device] = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["count"], device["driver"], device["capabilities"]) == (int(gpus), "nvidia", ["gpu"])
        assert services[name]["environment"]["DRZERO_GPUS"] == gpus
    assert "deploy" not in services["ingest"] | services["redis"]


def test_the_overlay_runs_one_card_by_default_and_leaves_the_number_to_the_profile() -> None:
    trainer = project()["trainer"]
    assert trainer["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 1
    assert trainer["environment"]["DRZERO_PROFILE"] == "a100x1"
    assert trainer["environment"]["DRZERO_GPUS"] == ""


def test_gpu_services_are_built_and_named_apart_from_those_without() -> None:
    services = project()
    for name in SERVICES:
        assert services[name]["image"] == f"drzero/{name}-gpu:dev"
        assert services[name]["build"]["args"]["ACCELERATOR"] == "gpu"
        assert services[name]["build"]["target"] == name
    assert services["index"]["image"] == services["retrieval"]["image"]
    assert services["ingest"]["image"] == "drzero/ingest:dev"


def test_the_trainer_starts_beside_search_and_solver_once_there_is_an_index() -> None:
    services = project()
    conditions = {name: needed["condition"] for name, needed in services["trainer"]["depends_on"].items()}
    assert conditions == {
        "index": "service_completed_successfully", "retrieval": "service_started", "solver": "service_started",
    }  # fmt: skip
    assert services["solver"]["healthcheck"]["test"]


def test_gpu_services_have_room_for_nccl_and_no_memory_limit() -> None:
    services = project()
    for name in ("solver", "trainer"):
        assert int(services[name]["shm_size"]) >= 16 * 2**30
        assert services[name]["ulimits"]["memlock"] == -1
    assert [name for name in SERVICES if services[name].get("mem_limit")] == []


def test_gpu_containers_can_do_as_little_as_the_others() -> None:
    services = project()
    for name in SERVICES:
        assert services[name]["read_only"]
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]
        assert {port["host_ip"] for port in services[name].get("ports", [])} <= {"127.0.0.1"}


def test_the_dockerfile_has_the_stages_and_files_that_it_names() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    assert {"python-cpu", "python-gpu", "base", "ingest", *SERVICES} <= stages
    sources = set(re.findall(r"type=bind,source=([^,]+),", DOCKERFILE))
    assert {f"services/{name}/requirements-gpu.txt" for name in SERVICES} <= sources
    assert [source for source in sources if not (ROOT / source).is_file()] == []


def test_stages_that_choose_by_accelerator_declare_it() -> None:
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        body = stage.partition("\n")[2]
        assert ("${ACCELERATOR}" in body) == ("ARG ACCELERATOR" in body), stage.partition("\n")[0]


def test_gpu_images_share_one_layer_because_their_pins_agree() -> None:
    retrieval, solver, trainer = map(gpu_pins, SERVICES)
    assert solver.items() <= trainer.items()
    own = {"faiss-cpu", "openvino", "openvino-telemetry", "pystemmer", "tantivy", "threadpoolctl"}
    assert {name for name, _ in retrieval.items() - trainer.items()} == own


@pytest.mark.parametrize("service", SERVICES)
def test_the_overridden_versions_are_pinned_in_every_gpu_set(service: str) -> None:
    overrides = pins(ROOT / "requirements-gpu-overrides.txt")
    assert overrides.keys() == {"torch", "transformers"}
    assert overrides.items() <= gpu_pins(service).items()


def uv(*arguments: str) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).with_name("uv")
    return subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A package index that answers; without one nothing can be resolved or installed."""
    wanted = tmp_path_factory.mktemp("index") / "one.in"
    wanted.write_text("six\n")
    if (done := uv("pip", "compile", "--quiet", "--no-cache", str(wanted))).returncode:
        pytest.skip(f"no package index answers: {done.stderr[-300:]}")


@pytest.mark.slow
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("service", SERVICES)
def test_the_gpu_pins_are_what_the_declared_dependencies_resolve_to(service: str, tmp_path: Path) -> None:
    declared = ROOT / f"services/{service}/requirements-gpu.in"
    resolved = tmp_path / "resolved.txt"
    done = uv(
        "pip", "compile", "--quiet", "--no-annotate", *PLATFORM, "--prerelease", "if-necessary-or-explicit",
        "--override", "requirements-gpu-overrides.txt", "--extra", service, "pyproject.toml",
        *([str(declared)] if declared.is_file() else []),
        "-c", f"services/{service}/requirements-gpu.txt", "-o", str(resolved),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pins(resolved) == gpu_pins(service)


@pytest.mark.slow
@pytest.mark.usefixtures("index")
def test_the_largest_gpu_set_installs_without_cuda(tmp_path: Path) -> None:
    # The trainer's set holds the solver's. Without dependencies, as in the image: the pins name every package.
    if shutil.disk_usage(tmp_path).free < 2 * INSTALLED_GB * 2**30:
        pytest.skip(f"expected {2 * INSTALLED_GB} GB of free disk to install the GPU packages")
    site = tmp_path / "site"
    try:
        done = uv(
            "pip", "install", "--quiet", "--no-deps", "--no-cache", "--no-config", *PLATFORM, "--target", str(site),
            "-r", "services/trainer/requirements-gpu.txt",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        installed = {path.name.rpartition("-")[0] for path in site.glob("*.dist-info")}
        assert len(installed) == len(gpu_pins("trainer"))
        assert (site / "torch/lib/libtorch_cuda.so").is_file()
    finally:
        shutil.rmtree(site, ignore_errors=True)

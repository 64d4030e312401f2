"""The self-test of GPU services: every misfit is refused with one sentence, and a CPU service is left alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from shared.gpu import cards_wanted, gpu_settings, machine_problems, memory_problems, self_test
from shared.hardware import Card, Gpus
from shared.settings import Settings, build_settings

ROOT = Path(__file__).parents[1]
A100 = Card("NVIDIA A100-SXM4-80GB", 80.0, 79.2, (8, 0))
H200 = Card("NVIDIA H200", 140.4, 139.7, (9, 0))
B200 = Card("NVIDIA B200", 178.0, 177.0, (10, 0))
V100 = Card("Tesla V100-SXM2-32GB", 32.0, 31.7, (7, 0))
L4 = Card("NVIDIA L4", 22.5, 22.1, (8, 9))

# What NVML says, as a library of its own: compiled, loaded and asked like NVIDIA's.
NVML = """
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *t, unsigned n) { strcpy(t, getenv("STUB_DRIVER")); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *v) { *v = 12080; return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { if (i > 1) return 2; *h = (void *)(long)(i + 1); return 0; }
int nvmlDeviceGetHandleByUUID(const char *u, void **h) {
  if (strcmp(u, "GPU-second")) return 6; *h = (void *)2; return 0; }
int nvmlDeviceGetName(void *h, char *t, unsigned n) { strcpy(t, h == (void *)1 ? "NVIDIA L4" : "Tesla T4"); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory *m) { m->total = 24ull << 30; m->free = 3ull << 29; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *h, int *a, int *b) { *a = h == (void *)1 ? 8 : 7; *b = 5; return 0; }
"""


def settings(**variables: str) -> Settings:
    return build_settings({f"DRZERO_{name}": value for name, value in variables.items()})


@pytest.mark.parametrize("card", [A100, H200, B200])
def test_a_card_that_fits_has_no_problem(card: Card) -> None:
    assert machine_problems(Gpus("580.65.06", "13.0", (card,)), 1, ["x"]) == []
    assert memory_problems(settings(PROFILE="a100x1"), [card]) == []


@pytest.mark.parametrize(
    ("found", "wanted", "words"),
    [
        (None, 1, ["expected 1", "trainer.actor.device=cuda", "no NVIDIA driver", "DRZERO_PROFILE=demo"]),
        (Gpus("580.65.06", "13.0", ()), 1, ["expected 1", "found 0", "DRZERO_GPUS"]),
        (Gpus("580.65.06", "13.0", (A100,) * 4), 8, ["expected 8", "found 4"]),
        (Gpus("575.57.08", "12.9", (A100,)), 1, ["driver 580", "575.57.08", "CUDA 12.9", "update"]),
        (Gpus("580.65.06", "13.0", (A100, V100)), 2, ["8.0 (sm_80", "Tesla V100", "7.0", "another card"]),
    ],
)
def test_a_misfit_is_one_sentence_with_expected_found_and_remedy(
    found: Gpus | None, wanted: int, words: list[str]
) -> None:
    [problem] = machine_problems(found, wanted, ["trainer.actor.device=cuda"])
    assert [word for word in words if word not in problem] == []


def test_cards_that_are_not_used_may_be_old() -> None:
    assert machine_problems(Gpus("580.65.06", "13.0", (A100, V100)), 1, ["x"]) == []


def test_a_card_too_small_for_the_profiles_plan_names_both_sizes_and_what_to_lower() -> None:
    small = Card("NVIDIA A100-PCIE-40GB", 40.0, 39.5, (8, 0))
    problem = memory_problems(settings(PROFILE="a100x1"), [small])[-1]
    assert "profile a100x1 takes" in problem
    assert "found a card of 40.0 GB" in problem
    assert "DRZERO_TRAINER__ACTOR__LORA_RANK" in problem


def test_the_smallest_card_decides() -> None:
    assert memory_problems(settings(PROFILE="a100x1"), [H200, L4]) == memory_problems(settings(PROFILE="a100x1"), [L4])


def test_no_plan_is_held_against_a_model_that_is_not_known_yet() -> None:
    assert memory_problems(settings(PROFILE="a100x1", SOLVER__MODEL="some/unknown-model"), [L4]) == []


def test_services_want_the_cards_their_settings_say() -> None:
    eight = settings(PROFILE="a100x8")
    assert [cards_wanted(eight, service) for service in ("retrieval", "solver", "trainer")] == [1, 8, 8]
    split = settings(PROFILE="a100x8", SOLVER__SGLANG__TP_SIZE="2", RETRIEVAL__ENCODER__DEVICE="cuda:3")
    assert [cards_wanted(split, service) for service in ("retrieval", "solver")] == [4, 2]


def test_a_cpu_profile_wants_no_card_and_is_not_tested() -> None:
    demo = settings()
    assert gpu_settings(demo) == {}
    assert [cards_wanted(demo, service) for service in ("retrieval", "solver", "trainer")] == [0, 0, 0]
    self_test(demo, "trainer", structlog.get_logger())


@pytest.mark.parametrize("gpus", ["1", "2", "4", "8"])
def test_one_number_says_how_many_gpus_trainer_and_solver_use(gpus: str) -> None:
    values = settings(PROFILE="a100x8", GPUS=gpus)
    assert (values.trainer.actor.gpus, values.solver.sglang.dp_size) == (int(gpus), int(gpus))


def test_what_is_said_for_trainer_or_solver_wins_over_the_number_of_gpus() -> None:
    values = settings(PROFILE="a100x8", GPUS="8", TRAINER__ACTOR__GPUS="6", SOLVER__SGLANG__TP_SIZE="2")
    assert (values.trainer.actor.gpus, values.solver.sglang.dp_size, values.solver.sglang.tp_size) == (6, 1, 2)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libnvidia-ml.so.1 that tells of two cards and an old driver."""
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(NVML)
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")]
    try:
        subprocess.run(command, check=True, timeout=60, capture_output=True)
    except FileNotFoundError:
        pytest.skip("expected a C compiler (cc) to build a stand-in for NVIDIA's library, found none")
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def python(library: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DRZERO_", "CUDA_VISIBLE"))}
    environ |= {"LD_LIBRARY_PATH": str(library), "STUB_DRIVER": "570.86.15", **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA L4", "Tesla T4"]),
        ("1,0", ["Tesla T4", "NVIDIA L4"]),
        ("GPU-second", ["Tesla T4"]),
        ("0,7,1", ["NVIDIA L4"]),
        ("", []),
    ],
)
def test_facts_are_read_from_nvml_for_the_cards_that_are_visible(
    library: Path, visible: str | None, names: list[str]
) -> None:
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = python(library, "-c", "from shared.hardware import *; print(gpus())", **variables)
    assert done.stderr == ""
    cards = tuple(Card(name, 24.0, 1.5, (8 if name == "NVIDIA L4" else 7, 5)) for name in names)
    assert done.stdout.strip() == repr(Gpus("570.86.15", "12.8", cards))


def start(library: Path, folder: Path, service: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    ports = {f"DRZERO_{name}__PORT": str(free_port()) for name in ("RETRIEVAL", "SOLVER", "TRAINER")}
    folders = {"DRZERO_STORAGE__DATA_DIR": str(folder), "DRZERO_STORAGE__SCRATCH_DIR": str(folder)}
    return python(library, "-m", f"services.{service}", **ports, **folders, **variables)


@pytest.mark.parametrize("service", ["retrieval", "solver", "trainer"])
def test_a_service_refuses_an_old_driver_with_one_sentence(library: Path, tmp_path: Path, service: str) -> None:
    done = start(library, tmp_path, service, DRZERO_PROFILE="rtx24")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{service}: expected NVIDIA driver 580 or newer")


@pytest.mark.parametrize("service", ["retrieval", "solver", "trainer"])
def test_a_service_refuses_a_card_too_small_for_the_plan(library: Path, tmp_path: Path, service: str) -> None:
    done = start(library, tmp_path, service, DRZERO_PROFILE="a100x1", STUB_DRIVER="580.65.06")
    assert done.returncode == 1
    assert "profile a100x1 takes" in done.stderr
    assert "found a card of 24.0 GB" in done.stderr
    assert "DRZERO_GPU_PLAN=warn" in done.stderr


def test_a_card_that_fits_is_named_and_the_service_goes_on(library: Path, tmp_path: Path) -> None:
    done = start(library, tmp_path, "trainer", DRZERO_PROFILE="rtx24", STUB_DRIVER="580.65.06")
    said = done.stdout + done.stderr
    assert '"driver": "580.65.06"' in said
    assert "NVIDIA L4, 24 GB, 2 GB free, compute capability 8.5" in said
    assert "corpus" in done.stderr  # the next thing that is missing

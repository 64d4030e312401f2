"""The doctor: each check says ok, warn or FAIL with what was found and what to do; the command's status follows."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shared.doctor import (
    Finding,
    check_cards,
    check_folder,
    check_memory,
    check_model,
    check_port,
    check_python,
    check_redis,
    check_shared_memory,
    check_source,
)
from shared.hardware import Card, Gpus, memory_gb
from shared.settings import IngestSettings, RedisSettings, Settings, build_settings, profiles

ROOT = Path(__file__).parents[1]
A100 = Card("NVIDIA A100-SXM4-80GB", 80.0, 79.5, (8, 0))
GIB = 1024**3


def settings(**variables: str) -> Settings:
    return build_settings({f"DRZERO_{name}": value for name, value in variables.items()})


@contextmanager
def program(pages: dict[str, str]) -> Iterator[int]:
    """A program with these pages on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path, "").encode()
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_finding_is_one_line() -> None:
    assert str(Finding("FAIL", "gpu", "none", "add one")) == "FAIL gpu: none; add one"
    assert str(Finding("ok", "gpu", "one")) == "ok   gpu: one"


@pytest.mark.parametrize(("version", "level"), [((3, 10), "FAIL"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "FAIL")])
def test_python_is_one_that_all_packages_support(version: tuple[int, int], level: str) -> None:
    assert check_python(version).level == level


def test_a_free_port_is_ok() -> None:
    assert check_port("solver", "127.0.0.1", free_port()).level == "ok"


def test_a_port_of_another_program_is_a_failure_that_names_the_variable() -> None:
    with program({"/health": "{}"}) as port:
        finding = check_port("solver", "127.0.0.1", port)
    assert (finding.level, finding.found) == ("FAIL", "in use by another program")
    assert "DRZERO_SOLVER__PORT" in finding.advice


def test_a_port_of_a_program_that_speaks_no_http_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]

        def hang_up() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        finding = check_port("trainer", "127.0.0.1", port)
        thread.join()
    assert finding.level == "FAIL"


@pytest.mark.parametrize(
    ("service", "metrics"),
    [
        ("retrieval", "drzero_retrieval_queue_queries 0"),
        ("solver", "sglang:num_running_reqs 0"),
        ("trainer", "drzero_trainer_step 1"),
    ],
)
def test_our_own_running_service_is_a_warning_unless_ports_must_be_free(service: str, metrics: str) -> None:
    with program({"/health": "{}", "/metrics": metrics}) as port:
        assert check_port(service, "127.0.0.1", port).level == "warn"
        assert check_port(service, "127.0.0.1", port, must_be_free=True).level == "FAIL"


def test_another_service_of_ours_on_the_port_is_a_failure() -> None:
    with program({"/health": "{}", "/metrics": "drzero_solver_pending_requests 0"}) as port:
        assert check_port("retrieval", "127.0.0.1", port).level == "FAIL"


def test_an_address_of_another_machine_is_a_failure() -> None:
    finding = check_port("solver", "192.0.2.1", 0)
    assert finding.level == "FAIL"
    assert "DRZERO_SOLVER__HOST" in finding.advice


def test_a_folder_needs_room_and_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "data"
    assert check_folder("data", folder, 0.0).level == "ok"
    finding = check_folder("data", folder, 1e9)
    assert finding.level == "FAIL"
    assert "DRZERO_STORAGE__MIN_FREE_GB" in finding.advice
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    finding = check_folder("data", tmp_path / "data" / "inside", 0.0)
    assert (finding.level, finding.found) == ("FAIL", f"{tmp_path / 'data'} is a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in check_folder("scratch", tmp_path, 0.0).found


@pytest.mark.parametrize(("available", "level"), [(10.0, "ok"), (9.9, "warn"), (5.1, "warn"), (4.4, "FAIL")])
def test_little_memory_warns_and_half_of_it_fails(available: float, level: str) -> None:
    assert check_memory("demo", available).level == level


def test_every_profile_has_a_memory_expectation() -> None:
    assert [name for name in profiles() if check_memory(name, 0.1).level != "FAIL"] == []


def test_small_shared_memory_is_a_warning() -> None:
    assert check_shared_memory(0.064, 1.0).level == "warn"
    assert check_shared_memory(1.0, 1.0).level == "ok"


def container(root: Path, limit: str) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\nHugePages_Total: 0\n"
    )
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
    (root / "sys/fs/cgroup/memory.current").write_text(f"{3 * GIB}\n")
    (root / "sys/fs/cgroup/memory.stat").write_text(f"anon {GIB}\ninactive_file {2 * GIB}\n")
    return root


def test_memory_counts_a_containers_limit_without_its_file_cache(tmp_path: Path) -> None:
    assert memory_gb(container(tmp_path, str(4 * GIB))) == pytest.approx((4 * GIB / 1e9, 3 * GIB / 1e9))


def test_a_container_without_limit_has_the_machines_memory(tmp_path: Path) -> None:
    assert memory_gb(container(tmp_path, "max")) == pytest.approx((16 * GIB / 1e9, 8 * GIB / 1e9))


def gpu_levels(found: Gpus | None, **variables: str) -> dict[str, str]:
    return {finding.name: finding.level for finding in check_cards(settings(**variables), found)}


def test_a_profile_without_gpus_has_no_gpu_finding() -> None:
    assert check_cards(settings(), None) == []


def test_a_missing_driver_is_a_failure_that_names_the_settings_that_ask_for_gpus() -> None:
    [finding] = check_cards(settings(PROFILE="a100x1"), None)
    assert finding.level == "FAIL"
    assert "solver.engine=sglang" in finding.found


def test_an_idle_card_of_the_profiles_size_is_ok_with_its_plan() -> None:
    found = Gpus("580.65.06", "13.0", (A100,))
    assert gpu_levels(found, PROFILE="a100x1") == {"gpu driver": "ok", "gpu 0": "ok", "gpu memory": "ok"}


def test_a_busy_card_is_a_warning() -> None:
    busy = Gpus("580.65.06", "13.0", (Card("NVIDIA A100-SXM4-80GB", 80.0, 20.0, (8, 0)),))
    assert gpu_levels(busy, PROFILE="a100x1")["gpu 0"] == "warn"


def test_a_card_too_small_for_the_plan_fails_and_only_warns_where_that_is_wished() -> None:
    small = Gpus("580.65.06", "13.0", (Card("NVIDIA L4", 22.5, 22.4, (8, 9)),))
    assert gpu_levels(small, PROFILE="a100x1")["gpu memory"] == "FAIL"
    assert gpu_levels(small, PROFILE="a100x1", GPU_PLAN="warn")["gpu memory"] == "warn"


def test_an_unknown_model_has_no_plan_yet() -> None:
    found = Gpus("580.65.06", "13.0", (A100,))
    assert gpu_levels(found, PROFILE="a100x1", SOLVER__MODEL="some/unknown-model")["gpu memory"] == "warn"


def test_a_model_in_an_installed_package_is_ok_and_a_missing_package_names_the_command() -> None:
    assert check_model("V", "package:json/decoder.py").level == "ok"
    finding = check_model("V", "package:no_such_module/x.gguf")
    assert finding.level == "FAIL"
    assert "requirements-demo-models.txt" in finding.found


@pytest.mark.parametrize(
    "reference", ["package:", "package:no_such.module", "package:json/nothing", "no/such/folder", "/none"]
)
def test_a_model_that_cannot_be_there_is_a_failure(reference: str) -> None:
    assert check_model("DRZERO_SOLVER__MODEL", reference).level == "FAIL"


def test_a_model_folder_needs_its_configuration(tmp_path: Path) -> None:
    assert check_model("V", str(tmp_path)).level == "FAIL"
    (tmp_path / "config.json").write_text("{}")
    assert check_model("V", str(tmp_path)).level == "ok"


def cached_model(home: Path, *files: str) -> None:
    """A Hugging Face cache with one model, as a download leaves it."""
    repository = home / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    for name in files:
        (repository / "snapshots" / "abc" / name).write_text("{}")


@pytest.mark.parametrize(
    ("files", "offline", "level"),
    [
        (("config.json", "model.safetensors"), "", "ok"),
        (("config.json",), "", "warn"),
        ((), "", "warn"),
        ((), "1", "FAIL"),
    ],
)
def test_a_hugging_face_model_is_cached_downloaded_later_or_out_of_reach(
    tmp_path: Path, files: tuple[str, ...], offline: str, level: str
) -> None:
    cached_model(tmp_path, *files)
    code = "from shared.doctor import check_model; print(check_model('V', 'some/model').level)"
    environ = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline}
    environ.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == level, done.stderr


def test_redis_is_checked_only_where_it_is_set_and_its_password_is_not_shown() -> None:
    assert check_redis(RedisSettings()) == []
    [finding] = check_redis(RedisSettings(url=f"redis://me:hunter2@127.0.0.1:{free_port()}/0"))
    assert finding.level == "warn"
    assert "hunter2" not in str(finding)


def test_a_redis_that_answers_is_ok() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(4096):
                    # As many replies as the client has sent commands; PONG serves for its greeting, too.
                    connection.sendall(b"+PONG\r\n" * data.count(b"*"))

        thread = threading.Thread(target=answer)
        thread.start()
        [finding] = check_redis(RedisSettings(url=f"redis://127.0.0.1:{listener.getsockname()[1]}/0?protocol=2"))
        thread.join()
    assert finding.level == "ok"


def test_a_wrong_redis_address_is_a_failure() -> None:
    [finding] = check_redis(RedisSettings(url="redis://localhost:port/0"))
    assert finding.level == "FAIL"


def test_the_folder_of_pubmed_xml_exists_and_has_such_files(tmp_path: Path) -> None:
    assert check_source(IngestSettings()).found == "the shipped demo records"
    assert check_source(IngestSettings(xml_dir=tmp_path / "none")).level == "FAIL"
    assert check_source(IngestSettings(xml_dir=tmp_path)).found == f"no PubMed XML file in {tmp_path}"
    assert check_source(IngestSettings(source="xml")).level == "FAIL"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.xml.gz").write_text("")
    assert check_source(IngestSettings(xml_dir=tmp_path)).level == "ok"


def test_an_entrez_search_needs_a_contact_address() -> None:
    assert "DRZERO_INGEST__EMAIL" in check_source(IngestSettings(query="cancer")).advice
    assert "DRZERO_INGEST__QUERY" in check_source(IngestSettings(source="entrez")).advice
    assert check_source(IngestSettings(query="cancer", email="me@example.org")).level == "ok"


def doctor(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    base = {
        "STORAGE__DATA_DIR": str(folder / "data"),
        "STORAGE__SCRATCH_DIR": str(folder / "scratch"),
        "STORAGE__MIN_FREE_GB": "0",
        "SOLVER__MODEL": "package:json",
        "TRAINER__ACTOR__MODEL": "package:json",
        "RETRIEVAL__ENCODER__MODEL": "package:json",
    }
    ports = {f"{service}__PORT": str(free_port()) for service in ("RETRIEVAL", "SOLVER", "TRAINER")}
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DRZERO_")}
    environ |= {f"DRZERO_{name}": value for name, value in (base | ports | variables).items()}
    command = [sys.executable, "-m", "shared.doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)


def test_the_command_prints_a_line_per_check_and_changes_nothing(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    assert all(line.startswith(("ok   ", "warn ", "FAIL ")) for line in done.stdout.splitlines())
    assert "ok   settings: profile demo" in done.stdout
    # Memory is the machine's own and may be short while the tests run.
    failed = {line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("FAIL")} - {"FAIL memory"}
    assert failed == set()
    assert done.returncode == (1 if "FAIL" in done.stdout else 0)
    assert list(tmp_path.iterdir()) == []


def test_one_failure_is_status_1_with_a_sentence_that_names_it(tmp_path: Path) -> None:
    done = doctor(tmp_path, INGEST__XML_DIR=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "FAIL papers: " in done.stdout
    assert done.stderr.startswith("doctor: ")
    assert "papers" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_running_stack_fails_only_where_ports_must_be_free(tmp_path: Path) -> None:
    with program({"/health": "{}", "/metrics": "drzero_retrieval_queue_queries 0"}) as port:
        assert "warn port" in doctor(tmp_path, RETRIEVAL__PORT=str(port)).stdout
        done = doctor(tmp_path, "--ports-free", RETRIEVAL__PORT=str(port))
    assert done.returncode == 1
    assert f"FAIL port {port} (retrieval)" in done.stdout


def test_wrong_settings_are_status_2_with_one_sentence(tmp_path: Path) -> None:
    done = doctor(tmp_path, TRAINER__STEP="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "doctor: unknown variable DRZERO_TRAINER__STEP; did you mean DRZERO_TRAINER__STEPS?\n"

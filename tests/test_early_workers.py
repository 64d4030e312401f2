"""verl's router, started early: it is the one that verl gets, and it knows the servers that verl names."""

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs the trainer's packages")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of its own; verl's function is put back afterwards."""
    import ray
    from verl.workers.rollout import router

    monkeypatch.setattr(router, "get_router_handle", router.get_router_handle)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 1024**2,
        log_to_driver=False,
        configure_logging=False,
    )
    yield ray
    ray.shutdown()


def test_verl_gets_the_router_that_was_started_early_with_its_servers(cluster: Any) -> None:
    from verl.workers.rollout import llm_server

    from services.trainer.early_workers import start_router

    start_router()
    manager = object.__new__(llm_server.LLMServerManager)
    manager.rollout_config, manager._load_balancer_cls = None, None
    manager.server_addresses, manager.server_handles = ["a", "b"], ["first", "second"]
    asyncio.run(manager._init_global_load_balancer())
    found = manager.global_load_balancer
    assert sorted(cluster.get(found.get_all_servers.remote())) == ["a", "b"]
    routed = {cluster.get(found.acquire_server.remote(f"request {number}")) for number in range(8)}
    assert {(address, handle) for address, handle in routed} == {("a", "first"), ("b", "second")}


def test_verl_asks_for_its_router_where_ours_is_put() -> None:
    from verl.workers.rollout import llm_server, router

    source = inspect.getsource(llm_server.LLMServerManager._init_global_load_balancer)
    assert "from verl.workers.rollout.router import get_router_handle" in source
    assert "servers" in inspect.signature(router.get_router_handle).parameters

"""Test on which nodes replicas run and which addresses they use, without starting Ray."""

from __future__ import annotations

import inspect

import pytest

from core.config.schema import Config
from core.model.resolve import ResolvedModel
from core.rpc.credentials import ClusterCredentials
from core.state.store import Store
from core.types import Pool

pytestmark = pytest.mark.integration

NODE = "10.0.0.7"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("localhost", "localhost"), ("10.0.0.1", NODE)],
)
def test_a_replica_uses_the_address_of_its_own_node(
    host: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from cluster.ray.replica import on_this_node

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: NODE)
    config = Config.model_validate({"cluster": {"host": host, "name": "c"}, "router": {"port": 1}})
    changed = on_this_node(config)
    assert changed.cluster.host == expected
    assert changed.cluster.name == "c"
    assert changed.router == config.router


def test_the_router_is_pinned_to_the_head_and_the_workers_are_not() -> None:
    from cluster.ray.app import APP, build_app, build_worker
    from cluster.ray.deployments import WorkerAppSettings

    settings = WorkerAppSettings(
        Config(),
        ResolvedModel("", "m"),
        Store.of(Config(), ""),
        ClusterCredentials.create(),
        cuda=False,
        main_app=APP,
    )
    router = build_app(settings)._bound_deployment
    assert router.ray_actor_options["resources"] == {"node:__internal_head__": 0.001}
    for pool in Pool:
        worker = build_worker(settings, pool)._bound_deployment
        assert not worker.ray_actor_options.get("resources")


def test_rays_handler_of_sigterm_calls_what_drain_on_sigterm_replaces() -> None:
    from ray._private import worker as ray_worker

    source = inspect.getsource(ray_worker.Worker.main_loop)
    assert "set_sigterm_handler(sigterm_handler)" in source
    assert "raise_sys_exit_with_custom_error_message(" in source
    assert hasattr(ray_worker, "raise_sys_exit_with_custom_error_message")

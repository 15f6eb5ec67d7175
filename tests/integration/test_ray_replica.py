"""Test on which nodes replicas run and which addresses they use, without starting Ray."""

from __future__ import annotations

import pytest

from core.config.schema import Config
from core.model.resolve import ResolvedModel
from core.rpc.credentials import ClusterCredentials
from core.state.store import Store

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
    from cluster.ray.app import build_app

    app = build_app(
        Config(),
        ResolvedModel("", "m"),
        Store.of(Config(), ""),
        credentials=ClusterCredentials.create(),
        cuda=False,
    )
    router = app._bound_deployment
    assert router.ray_actor_options["resources"] == {"node:__internal_head__": 0.001}
    for worker in router.init_args[1:]:
        assert not worker._bound_deployment.ray_actor_options.get("resources")

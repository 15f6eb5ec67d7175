"""Sets how many routers Ray Serve runs.

    python -m tests.support.scale_router GCS_ADDRESS NUMBER

0 stops the router, as Serve stops any replica. At most 1, because routers share one port. This runs
in its own process, because Ray keeps what its first start read from the environment.
"""

from __future__ import annotations

import sys

import ray
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from cluster.ray.app import ROUTER
from cluster.ray.head import APP

_CALL_TIMEOUT_S = 20.0


def main() -> None:
    address, number = sys.argv[1:]
    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    controller = _get_global_client()._controller
    router = DeploymentID(name=ROUTER, app_name=APP)
    ray.get(
        controller.update_deployment_replicas.remote(router, int(number)), timeout=_CALL_TIMEOUT_S
    )


if __name__ == "__main__":
    main()

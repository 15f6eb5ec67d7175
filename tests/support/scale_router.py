"""Sets how many routers Ray Serve runs.

    python -m tests.support.scale_router GCS_ADDRESS NUMBER

NUMBER is 0 or 1, because two routers would need the same port. With 0, Serve stops the router as it
stops any replica. This runs in its own process, because Ray reads the environment only when it
first starts in a process.
"""

from __future__ import annotations

import sys

import ray
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from cluster.ray.app import APP, ROUTER

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

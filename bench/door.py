"""`python -m bench.door GCS_ADDRESS NAMESPACE`: where a service's attention worker listens, and its secret.

Joins the service's Ray for a moment, as one more driver, and asks the controller.
"""

import json
import sys
import time

import cluster.session

from cluster.discovery import find_controller  # isort: skip

WATCH_S = 10.0
STANDBY_S = 20.0


def main() -> None:
    """Prints {"address": ..., "token": ...}."""
    import ray

    ray.init(
        address=sys.argv[1],
        namespace=sys.argv[2],
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address=cluster.session.LOOPBACK,
    )
    controller = find_controller(sys.argv[2])
    token = ray.get(controller.token.remote())
    give_up_s = time.monotonic() + STANDBY_S  # a process that is just starting would be measured, too
    while not ray.get(controller.status.remote())["standby"] and time.monotonic() < give_up_s:
        time.sleep(0.2)
    _, workers = ray.get(controller.watch_workers.remote(token, -1, WATCH_S))
    print(json.dumps({"address": next(iter(workers.values())), "token": token}))
    ray.shutdown()


if __name__ == "__main__":
    main()

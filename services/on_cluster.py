"""Whether a command shall use a Ray cluster that is there, told by the environment; asked before Ray is imported."""

import os


def on_cluster() -> bool:
    """In a Ray job, or with RAY_ADDRESS."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))

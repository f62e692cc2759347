"""Whether NIXL is here, and what must be known before its first agent. It is optional, and light to ask about."""

import importlib
import importlib.util
import logging
import logging.config
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODULES = ("nixl_cu13", "nixl_cu12", "nixl")


class NixlMissing(ValueError):
    """NIXL was asked for by name and cannot be imported here."""


def prepare_environment() -> None:
    """Keep NIXL and UCX quiet about peers that went away, which is this package's to report.

    For the entry of a process: both read the environment when they are loaded. What is set already stays.
    """
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    os.environ.setdefault("UCX_LOG_LEVEL", "FATAL")


def find_nixl() -> Any | None:
    """The bindings of the NIXL that is installed, or None."""
    for name in MODULES:
        try:
            with _logging_left_alone():
                return importlib.import_module(f"{name}._bindings")
        except ImportError:
            continue
    return None


def nixl_is_installed() -> bool:
    """Whether there is one to import, which takes a while."""
    return any(importlib.util.find_spec(name) is not None for name in MODULES)


@contextmanager
def _logging_left_alone() -> Iterator[None]:
    """NIXL configures all logging of a process when it is imported, and so closes the handlers of everybody else.

    Ray Serve, for one, asks its handlers for their file when its controller comes back, and ends a replica without.
    """
    configure, raises = logging.config.dictConfig, logging.raiseExceptions
    logging.config.dictConfig = lambda config: None
    try:
        yield
    finally:
        logging.config.dictConfig, logging.raiseExceptions = configure, raises


def need_nixl() -> Any:
    """The bindings of NIXL; raises NixlMissing saying how to get it."""
    found = find_nixl()
    if found is None:
        raise NixlMissing(
            "transport nixl: none of " + ", ".join(f"{name}._bindings" for name in MODULES) + " can be imported; "
            "install shoal[nixl] (Linux x86-64 or arm64), or use transport grpc or auto"
        )
    return found


def machine_identity() -> str:
    """Equal for two processes that can write each other's memory and hear each other's bell.

    That takes one kernel, one user, and the same process and network namespaces.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("pid", "net", "ipc")]
    return "/".join(map(str, (boot, os.getuid(), *spaces)))

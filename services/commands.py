"""What each subcommand of `shoal` does."""

import argparse
import json
import os
import signal
import time
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from services.keys import check_key
from services.state import ServiceRecord, is_running, read_record, running_services
from services.status import way_lines

DEFAULT_PORT = 8000


class CommandError(Exception):
    """A message for the person at the terminal."""

    status = 1  # with which the process ends


class Interrupted(CommandError):
    """A signal ended what was under way; the process ends with the status that a shell has for that signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class NoService(CommandError):
    """Nothing runs where it was looked for."""


def serve(options: argparse.Namespace) -> int:
    """Run in the foreground, or start the same in the background and wait until it answers."""
    from services.detach import detach
    from services.launch import serve_foreground
    from services.launch_options import LaunchError, LaunchOptions, check

    running = read_record(options.port)
    if running is not None:
        raise CommandError(
            f"port {options.port} already serves {running.model}: `shoal stop --port {options.port}` ends it"
        )
    launch = LaunchOptions(
        model=options.model,
        adapters=tuple(options.adapter),
        expert_hosts=options.expert_hosts,
        expert_replicas=options.expert_replicas,
        attention_replicas=options.attention_replicas,
        host=options.host,
        port=options.port,
        served_name=options.served_name,
        api_key=options.api_key,
        admin_token=os.environ.get("SHOAL_ADMIN_TOKEN") or None,
        max_length=options.max_length,
        cache_tokens=options.cache_tokens,
        threads=options.threads,
        transport=options.transport,
        auto_rebalance=options.auto_rebalance,
        gpus=options.gpus,
        log=os.environ.get("SHOAL_LOG"),
    )
    try:
        if options.detach:
            check(launch)
            return detach(options)
        return serve_foreground(launch, Console(markup=False, emoji=False))
    except (LaunchError, ValueError) as error:
        raise CommandError(str(error)) from error


def chat(options: argparse.Namespace) -> int:
    """One question, or a conversation until end of input."""
    from services.chat import converse

    url = find_service(options).url
    try:
        return converse(options, url, Console(highlight=False))
    except httpx.HTTPError as error:
        raise CommandError(
            f"{url} does not answer ({error}): wait until `shoal status` says that it is ready"
        ) from error


def status(options: argparse.Namespace) -> int:
    """Print what the service says of itself."""
    record = find_service(options)
    report = fetch_status(record)
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    console = Console(markup=False, emoji=False)
    console.print(f"{report['url']}  {report['state']}  epoch {report['epoch']}  {report['model']}", soft_wrap=True)
    if report.get("reason"):
        console.print(report["reason"], markup=False, highlight=False, soft_wrap=True)
    for title, rows in (("expert hosts", report["expert_hosts"]), ("attention workers", report["attention_workers"])):
        table = Table(title=title, title_justify="left")
        names = [name for name in ("id", "state", "generation", "experts", "pid", "node") if rows and name in rows[0]]
        for name in names:
            table.add_column(name)
        for row in rows:
            table.add_row(*(str(row[name])[:24] for name in names))
        console.print(table)
    for line in way_lines(report["attention_workers"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def fetch_status(record: ServiceRecord) -> dict[str, Any]:
    """The status document; raises CommandError with what the service said, or that it does not answer."""
    from services.admin_client import AdminClient, NotAnswered

    try:
        report = AdminClient(record).get("/admin/status")
    except NotAnswered as error:
        raise CommandError(f"{error}; it may still be starting") from error
    return {"url": record.url, "pid": record.pid, "log": record.log} | report


def stop(options: argparse.Namespace) -> int:
    """SIGTERM the service's process and wait until it is gone."""
    record = find_here(options.port)
    assert record.pid is not None
    os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + options.timeout
    while is_running(record.pid):
        if time.monotonic() > deadline:
            raise CommandError(f"pid {record.pid} has not ended in {options.timeout:.0f} s; try again, or kill it")
        time.sleep(0.1)
    print(f"stopped {record.url}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Print findings; status 1 when something must be mended."""
    from services.doctor import examine

    findings = examine(options.model, options.port)
    if options.json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}: {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


def find_service(options: argparse.Namespace) -> ServiceRecord:
    """The service at --address, the one that runs here on --port, that at $SHOAL_URL, or the one here on 8000.

    Raises NoService when there is none here.
    """
    address = options.address or (os.environ.get("SHOAL_URL") if options.port is None else None)
    if not address:
        return find_here(options.port if options.port is not None else DEFAULT_PORT)
    if not _can_be_asked(address):
        raise CommandError(f"--address {address}: expected a URL, such as http://10.0.0.7:8000")
    token = os.environ.get("SHOAL_ADMIN_TOKEN", "")
    return ServiceRecord(DEFAULT_PORT, address.rstrip("/"), None, "", token)


def _can_be_asked(address: str) -> bool:
    try:
        url = httpx.URL(address)
        url.raw_host.decode().encode("idna")  # as a name is, to look it up
    except (httpx.InvalidURL, UnicodeError):
        return False
    return url.scheme in ("http", "https") and bool(url.host) and (url.port is None or 0 < url.port < 1 << 16)


def authorization(key: str, named: str) -> dict[str, str]:
    """The header that shows a key; raises CommandError, by its name, for one that cannot be sent."""
    try:
        return {"Authorization": f"Bearer {check_key(key)}"}
    except ValueError as error:
        raise CommandError(f"{named} {error}") from None


def find_here(port: int) -> ServiceRecord:
    """The service that runs here on a port; raises NoService, with what else runs, when there is none."""
    record = read_record(port)
    if record is None:
        others = ", ".join(str(other.port) for other in running_services())
        hint = (
            f"services run on port {others}: name one with --port" if others else "start one with `shoal serve MODEL`"
        )
        raise NoService(f"no service runs on port {port}; {hint}")
    return record

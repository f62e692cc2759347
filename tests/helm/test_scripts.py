"""The shell that the chart writes, run by a real shell with commands that tell what they were called with."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.helm.charts import Values, find, groups, render


def run(script: str, commands: dict[str, str], directory: Path) -> subprocess.CompletedProcess[str]:
    """`commands`: what each does, in shell; `$state` is a file of theirs."""
    for name, does in commands.items():
        path = directory / name
        path.write_text(f'#!/bin/bash\nstate={directory}/state\necho "{name} $*" >> {directory}/called\n{does}\n')
        path.chmod(0o755)
    environment = {"PATH": f"{directory}:{os.environ['PATH']}", "POD_IP": "10.0.0.7"}
    command = ["/bin/bash", "-euc", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)


def hook(name: str, values: Values | None = None) -> str:
    (container,) = find(render(values), "Job", f"-{name}")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/bash", "-euc"]
    (script,) = container["args"]
    return str(script)


def stop(group: str) -> str:
    (container,) = groups(find(render(), "RayCluster"))[group]["template"]["spec"]["containers"]
    *shell, script = container["lifecycle"]["preStop"]["exec"]["command"]
    assert shell == ["/bin/bash", "-c"]
    return str(script)


@pytest.mark.parametrize(
    ("statuses", "code", "asked"),
    [
        (["status: DEPLOYING", "status: RUNNING"], 0, 2),
        (["status: NOT_STARTED", "", "status: DEPLOYING", "status: RUNNING"], 0, 4),
        (["status: DEPLOYING", "status: DEPLOY_FAILED\nmessage: no such model"], 1, 2),
        (
            ["status: DEPLOYING\ndeployments:\n  a:\n    replica_states:\n      RUNNING: 1", "status: RUNNING"],
            0,
            2,
        ),
    ],
)
def test_the_deploy_hook_waits_for_ray_then_for_the_application(
    tmp_path: Path, statuses: list[str], code: int, asked: int
) -> None:
    for number, status in enumerate(statuses):
        (tmp_path / f"status-{number}").write_text(status)
    serve = """
    count() { echo $(( $(cat $state.$1 2>/dev/null || echo 0) + 1 )) > $state.$1; cat $state.$1; }
    case "$*" in
      status) [ $(count ready) -ge 3 ] ;;
      "status --name shoal") cat "$(dirname $state)/status-$(( $(count asked) - 1 ))" ;;
      "deploy /etc/shoal/serve/serve.yaml") ;;
      *) exit 9 ;;
    esac"""
    ended = run(hook("deploy"), {"serve": serve, "sleep": ""}, tmp_path)
    assert ended.returncode == code, ended.stderr
    called = [line for line in (tmp_path / "called").read_text().splitlines() if line.startswith("serve")]
    assert called == ["serve status"] * 3 + ["serve deploy /etc/shoal/serve/serve.yaml"] + (
        ["serve status --name shoal"] * asked
    )
    assert ("no such model" in ended.stdout) == (code == 1)


def test_a_config_that_serve_refuses_fails_the_hook(tmp_path: Path) -> None:
    ended = run(hook("deploy"), {"serve": '[ "$1" = status ]', "sleep": ""}, tmp_path)
    assert ended.returncode == 1


@pytest.mark.parametrize("code", [0, 1])
def test_the_drain_hook_ends_as_the_command_does(tmp_path: Path, code: int) -> None:
    assert run(hook("drain"), {"shoal": f"exit {code}"}, tmp_path).returncode == code
    assert (tmp_path / "called").read_text() == "shoal experts drain --to 2 --if-running --wait --timeout 600\n"


def test_a_stopping_expert_pod_drains_itself(tmp_path: Path) -> None:
    run(stop("experts"), {"shoal": ""}, tmp_path)
    assert (tmp_path / "called").read_text() == (
        "shoal experts drain --node 10.0.0.7 --if-running --wait --timeout 600\n"
    )


def test_a_stopping_attention_pod_leaves_ray_and_waits(tmp_path: Path) -> None:
    run(stop("attention"), {"ray": "", "sleep": ""}, tmp_path)
    drain, wait = (tmp_path / "called").read_text().splitlines()
    assert drain.startswith("ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION ")
    assert drain.endswith("--deadline-remaining-seconds 60")
    assert wait == "sleep 60"


@pytest.mark.parametrize("source", [{"file": "/outputs/a.yaml"}, {"recipe": {"output_dir": "/outputs/a"}}])
def test_a_jobs_command_survives_the_way_to_the_head(tmp_path: Path, source: Values) -> None:
    """KubeRay puts it into a shell's command line, `ray job submit` joins the words again, and the head runs them."""
    arguments = ["optimizer.lr=1e-5", "name=a tide, (rising)", "paths=[/a,/b]"]
    values = {"jobs": [{"name": "sft", "args": arguments} | source], "outputs": {"claim": "outputs"}}
    job = find(render(values), "RayJob")
    line = subprocess.list2cmdline(shlex.split(job["spec"]["entrypoint"]))
    if "recipe" in source:
        script = shlex.split(line)[2]
        waited = script.split(" -e ")[1].split(" ]")[0]
        line = line.replace(waited, str(tmp_path / "recipe.yaml"))
        (tmp_path / "recipe.yaml").touch()
    ended = run(line, {"python": 'printf "%s\\n" "$@"'}, tmp_path)
    module, path, *given = ended.stdout.splitlines()[1:]
    assert module == "services.train"
    assert path == ("/outputs/a.yaml" if "file" in source else str(tmp_path / "recipe.yaml"))
    assert given == arguments

"""What stands beside the chart: its README's table, metric names in alerts and dashboard, the image's files."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from services.backend import Reading
from services.metrics import Exposition
from tests.helm.charts import CHART, EXAMPLES, example, find, render
from tests.services.script import service_report

ROOT = CHART.parents[1]
METRIC = re.compile(r"\bshoal_[a-z_]+\b")


def values_table(chart: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(chart.parent / "values_table.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_readme_has_every_value_with_its_comment() -> None:
    checked = values_table(CHART)
    assert checked.returncode == 0, checked.stderr
    table = re.findall(r"^\| `([A-Za-z.]+)` \| `.*` \| .+ \|$", (CHART / "README.md").read_text(), re.MULTILINE)

    def leaves(values: object, path: str = "") -> list[str]:
        if isinstance(values, dict) and values:
            return [leaf for name, value in values.items() for leaf in leaves(value, f"{path}.{name}")]
        return [path[1:]]

    assert table == leaves(yaml.safe_load((CHART / "values.yaml").read_text()))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("# Hosts that hold each expert.", "# Something else.", "run `python helm/values_table.py`"),
        ("  copies: 1\n", "  copies: 2\n", "run `python helm/values_table.py`"),
        ("  # Hosts that hold each expert.\n", "", "experts.copies has no comment"),
    ],
)
def test_a_table_that_is_behind_is_seen(tmp_path: Path, old: str, new: str, said: str) -> None:
    copied = shutil.copytree(CHART.parent, tmp_path / "helm") / "shoal"
    values = copied / "values.yaml"
    assert old in values.read_text()
    values.write_text(values.read_text().replace(old, new))
    checked = values_table(copied)
    assert checked.returncode == 1
    assert said in checked.stderr


def test_alerts_dashboard_and_keda_ask_for_metrics_that_there_are() -> None:
    text = Exposition("ingress-a").render(Reading(0, 0, service_report())).decode()
    known = set(re.findall(r"^(shoal_\w+?)(?:\{| )", text, re.MULTILINE))
    monitored = {"keda": {"enabled": True}, "monitoring": {"podMonitor": True, "rules": True, "dashboard": True}}
    objects = render(monitored)
    rules = [rule["expr"] for rule in find(objects, "PrometheusRule")["spec"]["groups"][0]["rules"]]
    panels = json.loads(find(objects, "ConfigMap", "-dashboard")["data"]["shoal.json"])["panels"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    scaled = [trigger["metadata"]["query"] for trigger in find(objects, "ScaledObject")["spec"]["triggers"]]
    asked = {name for query in (*rules, *shown, *scaled) for name in METRIC.findall(query)}
    assert asked <= known, asked - known
    assert len(asked) > 20
    assert all('{shoal="$shoal"}' in query for query in shown)


def test_the_image_is_built_from_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    taken = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert (
        packages | {"pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE", "models/bundled"}
        == taken
    )


def test_the_image_runs_as_the_charts_user_and_holds_its_model() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    dockerfile = (ROOT / "Dockerfile").read_text()
    user = values["security"]["user"]
    assert f"USER {user}:{user}" in dockerfile
    assert f"COPY models/bundled {values['model']['path']}\n" in dockerfile
    assert {"cpu", "gpu"} <= set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE))
    made = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert made["appVersion"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_image_has_what_kuberays_probes_call() -> None:
    """Older KubeRay than 1.6 asks a node for its health by `wget`, which python:slim has not."""
    runtime = (ROOT / "Dockerfile").read_text().partition(" AS runtime\n")[2].partition("\nFROM ")[0]
    assert re.search(r"apt-get install .*\bwget\b", runtime)
    assert runtime.index("wget") < runtime.index("USER ")


def test_the_readme_and_the_values_say_alike_which_kuberay_an_option_needs() -> None:
    readme = (CHART / "README.md").read_text()
    needs = " ".join(readme.partition("## What it needs\n")[2].partition("\n\n-")[0].split())
    assert "KubeRay 1.5.1" in needs
    newer = {"1.6": ["ray.upgradeStrategy=Recreate", "ray.tokenSecret"], "1.7": ["faultTolerance=embedded", "tls.ray"]}
    for version, options in newer.items():
        part = needs.partition(f"; {version} ")[2].partition(";")[0]
        for option in options:
            assert option in part
            row = re.findall(rf"^\| `[a-z.]*{option.partition('=')[0]}` .*$", readme, re.MULTILINE)
            assert f"KubeRay {version}" in row[0], option


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_and_the_readme_say_which_kuberay_it_needs(path: Path) -> None:
    text = path.read_text()
    (row,) = re.findall(rf"^\| \[{path.name}\].*\| (.*) \|$", (CHART / "README.md").read_text(), re.MULTILINE)
    if example(path).get("ray", {}).get("gcs", {}).get("faultTolerance") == "embedded":
        assert row == "1.7 with the gate"
        comment, _, _ = text.partition("\n  gcs:")
        assert "KubeRay 1.7 with its feature gate GCSFaultToleranceEmbeddedStorage" in comment.splitlines()[-1]
    else:
        assert row == "1.5.1"


def test_the_chart_names_the_ray_that_is_installed() -> None:
    (pinned,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["version"] == pinned

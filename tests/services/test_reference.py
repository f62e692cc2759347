"""What docs/ says of fields, metrics, variables and the Serve config file is what the code has."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field
from ray.serve.schema import ServeDeploySchema

from services.app import build
from services.app_args import AppArgs
from services.backend import Reading
from services.metrics import Exposition
from services.reference import COMMAND, DOCS, field_rows, main
from services.training.recipe import Recipe, parse_recipe
from tests.services.script import service_report

ROOT = DOCS.parent
SERVE = DOCS / "serve.md"
NOT_FOR_PEOPLE = {"SHOAL_LOG"}  # from `shoal serve --detach` to the process that it starts
RAYS_OWN_DEFAULT = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0"}


def leaves(values: dict[str, Any], path: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in values.items():
        found |= leaves(value, f"{path}{name}.") if isinstance(value, dict) and value else {path + name}
    return found


def first_column(document: Path) -> list[str]:
    return re.findall(r"^\| `([\w.=]+)`[^|]* \|", document.read_text(), re.MULTILINE)


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DOCS, tmp_path / "docs"))


def test_the_tables_are_what_the_code_says() -> None:
    assert main(["--check"]) == 0


def test_every_field_is_told() -> None:
    recipe = {
        "model": "m",
        "output_dir": "o",
        "data": {"files": ["f"]},
        "steps": 1,
        "yarn": {"factor": 2, "original_max_position_embeddings": 8},
    }
    assert leaves(parse_recipe(recipe).model_dump()) <= set(first_column(DOCS / "training.md"))
    tls = {"certificate": "c", "key": "k", "root": "r"}
    assert leaves(AppArgs.model_validate({"model": "m", "tls": tls}).model_dump()) <= set(first_column(SERVE))


def test_every_metric_is_told() -> None:
    scraped = Exposition("ingress-a").render(Reading(0, 0, service_report())).decode()
    told = [name for name in first_column(SERVE) if name.startswith("shoal_")]
    assert sorted(told) == sorted(re.findall(r"^# HELP (\w+) ", scraped, re.MULTILINE))


@pytest.mark.parametrize(
    ("document", "old", "new"),
    [
        ("training.md", "| `lr` | `1e-5` |", "| `lr` | `2e-5` |"),
        ("training.md", "| `snapshots.keep` |", "| `snapshots.kept` |"),
        ("serve.md", "| `experts.hosts` | `2` | at least 1 |", "| `experts.hosts` | `2` | at least 0 |"),
        ("serve.md", "| Calls to expert hosts |", "| Calls |"),
    ],
)
def test_a_table_that_is_behind_is_seen_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], document: str, old: str, new: str
) -> None:
    docs = copied(tmp_path)
    text = (docs / document).read_text()
    assert text.count(old) == 1
    (docs / document).write_text(text.replace(old, new))
    assert main(["--check"], docs) == 1
    assert f"run `{COMMAND}`" in capsys.readouterr().err
    assert main([], docs) == 0
    assert (docs / document).read_text() == text


def test_a_changed_default_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe.model_fields["batch_tokens"], "default", 8192)
    assert main(["--check"]) == 1


def test_a_document_without_a_place_for_its_table_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = copied(tmp_path)
    (docs / "serve.md").write_text(SERVE.read_text().replace("<!-- metrics:end -->", ""))
    assert main(["--check"], docs) == 1
    assert "no <!-- metrics:start --> and <!-- metrics:end -->" in capsys.readouterr().err


def test_a_field_that_says_nothing_is_refused() -> None:
    class Section(BaseModel):
        told: int = Field(1, description="a number")
        silent: int = 2

    class Whole(BaseModel):
        section: Section = Section()

    with pytest.raises(ValueError, match=r"section\.silent has no description"):
        list(field_rows(Whole))


def test_serve_takes_the_config_file() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", SERVE.read_text(), re.MULTILINE | re.DOTALL)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    AppArgs.model_validate(application.args)
    assert {deployment.name for deployment in application.deployments} <= {"attention", "ingress"}


def test_every_variable_of_shoals_is_told() -> None:
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "bench")]
    sources = [path.read_text() for package in packages for path in package.rglob("*.py")]
    asked = {name for source in sources for name in re.findall(r"\bSHOAL_[A-Z_]+\b", source)}
    assert len(asked) > 3
    assert asked - NOT_FOR_PEOPLE == {name for name in first_column(SERVE) if name.startswith("SHOAL_")}


def test_a_cluster_of_ones_own_is_told_what_a_private_ray_gets() -> None:
    source = (ROOT / "cluster" / "session.py").read_text().partition("def keep_private")[2].partition("\ndef ")[0]
    private = {f"{name}={value}" for name, value in re.findall(r'setdefault\("(\w+)", "([\w.]+)"\)', source)}
    chart = (ROOT / "helm" / "shoal" / "templates" / "_volumes.tpl").read_text()
    charts = {f"{name}={value}" for name, value in re.findall(r'- name: (RAY_\w+).*\n  value: "([\w.]+)"', chart)}
    told = {name for name in first_column(SERVE) if name.startswith("RAY_") and "=" in name}
    assert told == private - RAYS_OWN_DEFAULT
    assert told <= charts

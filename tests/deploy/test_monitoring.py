"""Alerts and dashboard: they name only what a run exports, and the alerts come when they should."""

import json
import re
import shutil
from pathlib import Path
from urllib.request import urlopen

import pytest

from server.runs import lines, recorded_study
from server.tracking.prometheus import Prometheus
from tests.deploy.shipped import DEPLOY, load, run, tool
from tests.ports import free_port
from tests.server.runs import write_run

MONITORING = DEPLOY / "monitoring"
EXPRESSION = re.compile(r"(wardround_\w+)(?:\{([^}]*)\})?")
#: Labels that Prometheus itself gives to every series.
GIVEN = {"instance", "job"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every metric that a run exports, and the names of its labels."""
    folder = write_run(
        tmp_path_factory.mktemp("runs") / "7",
        rounds=2,
        faults=lambda number, site: "norm" if site == "hospital-1" else None,
        episodes__test_every=1,
    )
    port = free_port()
    exporter = Prometheus(str(port), folder, recorded_study(folder))
    try:
        for line in lines(folder / "history.jsonl"):
            exporter.round(line)
        for line in lines(folder / "evaluations.jsonl"):
            exporter.evaluation(line)
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
    finally:
        exporter.close()
    found = re.findall(r"^(\w+?)(?:\{(.*)\})? \S+$", text, re.MULTILINE)
    return {name: set(re.findall(r'(\w+)="', labels)) for name, labels in found}


def expressions() -> dict[str, str]:
    """Return all expressions, by the alert or panel that they belong to."""
    rules = {
        rule["alert"]: rule["expr"] for group in load(MONITORING / "alerts.yaml")["groups"] for rule in group["rules"]
    }
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return rules | {p["title"]: target["expr"] for p in dashboard["panels"] for target in p["targets"]}


def unknown(expression: str, exported: dict[str, set[str]]) -> set[str]:
    """Return the metrics and labels of an expression that no run exports."""
    found = set()
    for name, matchers in EXPRESSION.findall(expression):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        found |= {name} - set(exported) | {f"{name}: {one}" for one in labels - exported.get(name, labels) - GIVEN}
    return found


@pytest.mark.parametrize("where", expressions())
def test_every_figure_is_one_that_a_run_exports(where: str, exported: dict[str, set[str]]) -> None:
    assert EXPRESSION.search(expressions()[where])
    assert unknown(expressions()[where], exported) == set()


def test_a_figure_that_no_run_exports_is_found(exported: dict[str, set[str]]) -> None:
    assert unknown("rate(wardround_bytes[5m])", exported) == {"wardround_bytes"}
    assert unknown('wardround_sites{states="out"} > 0', exported) == {"wardround_sites: states"}


def test_the_texts_name_labels_that_their_figures_have(exported: dict[str, set[str]]) -> None:
    for group in load(MONITORING / "alerts.yaml")["groups"]:
        for rule in group["rules"]:
            named = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
            assert all(named <= exported[name] for name, _ in EXPRESSION.findall(rule["expr"]))
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert all(named <= exported[name] for name, _ in EXPRESSION.findall(target["expr"]))


def test_the_dashboard_s_panels_do_not_overlap() -> None:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for where in (panel["gridPos"] for panel in panels):
        assert where["x"] + where["w"] <= 24
        for x in range(where["x"], where["x"] + where["w"]):
            for y in range(where["y"], where["y"] + where["h"]):
                assert (x, y) not in taken
                taken.add((x, y))


def test_prometheus_takes_the_files() -> None:
    done = run([tool("promtool"), "check", "config", MONITORING / "prometheus.yaml"])
    assert done.returncode == 0, done.stdout


def test_the_alerts_come_when_they_should(tmp_path: Path) -> None:
    promtool = tool("promtool")
    # The annotations are for people: what is tested is when an alert comes, and about whom.
    rules = re.sub(r" +annotations:\n( {10}.*\n)+", "", (MONITORING / "alerts.yaml").read_text())
    (tmp_path / "alerts.yaml").write_text(rules)
    shutil.copy(Path(__file__).with_name("alerts.test.yaml"), tmp_path)
    done = run([promtool, "test", "rules", "alerts.test.yaml"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (tmp_path / "alerts.yaml").write_text(rules.replace("> 3600", "> 7200"))
    assert run([promtool, "test", "rules", "alerts.test.yaml"], cwd=tmp_path).returncode == 1

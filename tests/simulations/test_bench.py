"""The benchmarks run, check before they time, and write JSON; how fast anything is, is not a test."""

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from common.errors import DeviceError, RoundError
from simulations.bench import engine, ingest, overhead, perpatient, scale, server
from simulations.bench.cases import CASES, Case, tiny
from simulations.bench.timing import Timed, race


def test_the_engines_benchmark_compares_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = CliRunner().invoke(engine.app, ["--quick", "--cases", "conv4-1shot-k5", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "plain loop" in result.output
    rivals = json.loads(out.read_text())["cases"]["conv4-1shot-k5"]["rivals"]
    assert rivals["plain loop"]["times_plain"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert len(rivals["wardround"]["seconds"]) == 2
    assert 0 < max(rivals["wardround"]["errors_float64"]) < 1e-9


def test_an_unknown_case_is_explained() -> None:
    result = CliRunner().invoke(engine.app, ["--cases", "conv5"])
    assert result.exit_code == 2
    assert "conv5" in result.output


def _checked(name: str, case: Case) -> Timed:
    return Timed(check=engine.Contender(name, case, torch.device("cpu"), 1).check())


@pytest.mark.parametrize("name", ["conv4-5shot-k1", "resnet-w16", "first-conv4", "recompute-k5"])
def test_the_plain_loop_computes_what_the_engine_does(name: str) -> None:
    case = tiny(CASES[name])
    engine.judge({rival: _checked(rival, case) for rival in ("wardround", "plain loop")})


def test_a_rival_with_another_gradient_is_not_timed() -> None:
    case = tiny(CASES["conv4-5shot-k1"])
    first_order = _checked("wardround", replace(case, first_order=True))
    with pytest.raises(DeviceError, match="wardround does not compute"):
        engine.judge({"wardround": first_order, "plain loop": _checked("plain loop", case)})


@dataclass
class _Missing:
    def __call__(self) -> "_Counter":
        raise ImportError("no such library")


@dataclass
class _Counter:
    runs: int = 0

    def check(self) -> int:
        return self.runs

    def run(self) -> None:
        self.runs += 1
        sum(range(200_000))

    def peak(self) -> int | None:
        return 1


def test_a_race_has_as_many_rounds_as_asked_and_names_who_is_missing() -> None:
    results = race({"counter": _Counter, "missing": _Missing()}, 3)
    assert results["missing"].missing == "no such library"
    assert len(results["counter"].seconds) == 3
    assert results["counter"].ratios(results["counter"]) == [1, 1, 1]
    assert results["counter"].check == 0


@pytest.mark.slow
def test_the_benchmark_of_many_sites_runs(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    result = CliRunner().invoke(scale.app, ["--sites", "12", "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    few, many = json.loads(out.read_text())
    assert (few["sites"], many["sites"]) == (3, 12)
    assert many["messages"] == 12 + 11 + 12  # join, train but for the held-out site, evaluate
    assert 0 < many["engine_seconds"] < many["seconds"]


@pytest.mark.slow
def test_the_benchmark_of_indexing_runs(tmp_path: Path) -> None:
    out = tmp_path / "ingest.json"
    result = CliRunner().invoke(ingest.app, ["--quick", "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    measured = json.loads(out.read_text())
    assert measured["throughput"].keys() == {"uncompressed", "JPEG 2000", "JPEG-LS"}
    assert [size["files"] for size in measured["memory"]] == [20, 60]
    assert measured["episodes"]["warm"]["median"] > 0


@pytest.mark.slow
def test_the_coordinators_memory_does_not_grow_with_the_sites(tmp_path: Path) -> None:
    out = tmp_path / "server.json"
    result = CliRunner().invoke(server.app, ["--sites", "80", "--width", "192", "--turns", "2", "--json", str(out)])
    assert result.exit_code == 0, result.output
    measured = json.loads(out.read_text())
    few, many = measured["memory"]
    assert (few["sites"], many["sites"]) == (8, 80)
    assert few["numbers"] == many["numbers"] > 900_000
    assert many["peak_bytes"] < 1.15 * few["peak_bytes"]  # one more vector for each site would be three times as much
    assert set(measured["rivals"]) == set(server.CONTENDERS)
    assert all(len(rival["seconds"]) == 2 for rival in measured["rivals"].values())


def test_who_does_not_compute_the_mean_is_not_timed() -> None:
    checks = {name: Timed(check=server.Contender(name, 3, 100).check()) for name in server.CONTENDERS}
    server.judge(checks)
    assert checks["wardround"].check < 1e-7  # added in float64
    with pytest.raises(RoundError, match="plain loop does not compute"):
        server.judge({"plain loop": Timed(check=0.5)})


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # inside of torch.func.jvp
@pytest.mark.parametrize("name", ["wardround", "vmap(grad)", "wardround, product", "vmap(jvp(grad)), product"])
@pytest.mark.parametrize("network", perpatient.NETWORKS)
def test_every_rival_computes_the_patients_rows(name: str, network: str) -> None:
    case = replace(tiny(perpatient.NETWORKS[network]), tasks=3)
    perpatient.judge({name: Timed(check=perpatient.Contender(name, case, 1).check())})


def test_who_computes_other_rows_is_not_timed() -> None:
    with pytest.raises(DeviceError, match="opacus does not compute the patients' rows in float64"):
        perpatient.judge({"opacus": Timed(check={"float64": [1e-15, 1e-6]})})


@pytest.mark.slow
def test_the_benchmark_of_patients_runs_and_says_where_opacus_is_not_there(tmp_path: Path) -> None:
    out = tmp_path / "perpatient.json"
    result = CliRunner().invoke(perpatient.app, ["--quick", "--networks", "conv4", "--json", str(out)])
    assert result.exit_code == 0, result.output
    measured = json.loads(out.read_text())["networks"]["conv4"]
    there = find_spec("opacus") is not None
    assert measured["reference"] == ("opacus" if there else "vmap(grad)")
    assert ("say nothing about Opacus" in result.output) != there
    assert len(measured["rivals"]["wardround, product"]["seconds"]) == 2
    assert max(measured["rivals"]["wardround"]["errors_float64"]) < 1e-9


def test_a_round_s_overhead_is_what_it_takes_beyond_computing(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"seconds": 5.5}\n{"seconds": 4.0}\n{"seconds": 0.1}\n')
    assert overhead.beyond(tmp_path, 0.5) == [5.0, 3.5, 0.0]

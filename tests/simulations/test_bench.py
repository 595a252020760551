"""The benchmarks run, check before they time, and write JSON; how fast anything is, is not a test."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from simulations.bench import engine, plain, scale
from simulations.bench.cases import CASES, tiny
from simulations.bench.timing import race


def test_the_engines_benchmark_compares_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = CliRunner().invoke(engine.app, ["--quick", "--cases", "conv4-1shot-k5", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "plain loop" in result.output
    rivals = json.loads(out.read_text())["cases"]["conv4-1shot-k5"]["rivals"]
    assert rivals["plain loop"]["times_plain"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert len(rivals["wardround"]["seconds"]) == 2
    assert 0 < rivals["wardround"]["error_float64"] < 1e-9


def test_an_unknown_case_is_explained() -> None:
    result = CliRunner().invoke(engine.app, ["--cases", "conv5"])
    assert result.exit_code == 2
    assert "conv5" in result.output


@pytest.mark.parametrize("name", CASES)
def test_the_plain_loop_is_the_engines_rival_on_every_case(name: str) -> None:
    case = tiny(CASES[name])
    ours = engine.Contender("wardround", case, torch.device("cpu"), 1).check()["float64"]
    theirs = engine.Contender("plain loop", case, torch.device("cpu"), 1).check()["float64"]
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).max() < 1e-9 * abs(theirs).max()


def test_first_and_second_order_loops_differ() -> None:
    case = tiny(CASES["conv4-5shot-k1"])
    net, episodes = plain.network(case, torch.float32), case.episodes(2)
    exact, first = (plain.LOOPS["plain loop"](net, episodes, 0.05, 1, order) for order in (False, True))
    assert (exact - first).norm() > 0.01 * exact.norm()


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


def test_the_benchmark_of_many_sites_runs(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    result = CliRunner().invoke(scale.app, ["--sites", "12", "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    few, many = json.loads(out.read_text())
    assert (few["sites"], many["sites"]) == (3, 12)
    assert many["messages"] == 12 + 11 + 12  # join, train but for the held-out site, evaluate
    assert 0 < many["engine_seconds"] < many["seconds"]

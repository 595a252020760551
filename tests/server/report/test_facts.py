"""What is read of a run's folder, against what was written into it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.report.facts import STATES, read_facts
from tests.server.runs import BEGAN, write_lines, write_run

SITES = ["hospital-2", "hospital-10", "hospital-1"]


def faults(number: int, site: str) -> str | None:
    return {(2, "hospital-1"): "no-reply", (3, "hospital-2"): "error", (4, "hospital-2"): "norm"}.get((number, site))


def history_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_rounds_are_arrays_in_the_natural_order_of_sites(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rounds=5, sites=SITES, held_out=(), faults=faults, sites__rest_after=9)
    history = read_facts(folder).history
    assert history.sites == ("hospital-1", "hospital-2", "hospital-10")
    assert history.rounds.tolist() == [1, 2, 3, 4, 5]
    names = [[STATES[k] for k in row] for row in history.state]
    assert names == [
        ["in", "in", "in"],
        ["silent", "in", "in"],
        ["in", "error", "in"],
        ["in", "refused", "in"],
        ["in", "in", "in"],
    ]
    for row, line in enumerate(history_of(folder)):
        for column, site in enumerate(history.sites):
            sent = line["sites"].get(site)
            for name, values in (("loss", history.loss), ("accuracy", history.accuracy)):
                np.testing.assert_equal(values[row, column], np.float32(sent[name] if sent else np.nan))
        assert history.scalars["bytes_up"][row] == line["bytes_up"]
    assert (history.asked, history.lost) == (15, 3)


def test_resting_and_idle_are_told_apart(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rounds=30, faults=lambda n, s: "norm" if s == "hospital-1" else None, idle_share=0.3)
    history = read_facts(folder).history
    for row, line in enumerate(history_of(folder)):
        for column, site in enumerate(history.sites):
            wanted = {
                "resting": [r["site"] for r in line["resting"]],
                "idle": line["idle"],
                "in": line["sites"],
                "refused": [o["site"] for o in line["out"]],
            }
            assert site in wanted[STATES[history.state[row, column]]]


def test_rounds_done_again_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rounds=5, sites=SITES, held_out=(), faults=faults)
    again = {**history_of(folder)[2], "out": [], "sites": {s: {"loss": 9.0, "accuracy": 0.5} for s in SITES}}
    write_lines(folder / "history.jsonl", [again], "ab")
    facts = read_facts(folder)
    assert facts.history.rounds.tolist() == [1, 2, 3]
    assert (facts.history.loss[2] == 9).all()
    assert facts.history.lost == 1


def test_failures_are_counted_once_and_those_of_other_attempts_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rounds=5, sites=SITES, held_out=(), faults=faults)
    more: list[dict[str, Any]] = [
        {"event": "rejected", "round": 2, "attempt": 1, "site": "hospital-1", "why": "no-reply"},  # in the history
        {"event": "rejected", "round": 5, "attempt": 0, "site": "hospital-1", "why": "not-finite", "reason": "NaN"},
        {"event": "late", "round": 2, "attempt": 1, "site": "hospital-1"},
        {"event": "joined", "site": "hospital-1"},
    ]
    write_lines(folder / "events.jsonl", [{"at": BEGAN, **event} for event in more], "ab")
    facts = read_facts(folder)
    assert facts.failures == {
        "hospital-1": {"no-reply": 1, "not-finite": 1, "late": 1},
        "hospital-2": {"error": 1, "norm": 1},
    }
    assert facts.reasons["not-finite"] == "NaN"


def test_estimates_have_their_intervals_and_the_last_test_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rounds=6, episodes__test_every=2)
    facts = read_facts(folder)
    assert [(e.round, e.side) for e in facts.evaluations] == [(2, "validation"), (4, "validation"), (6, "test")]
    assert facts.final is facts.evaluations[-1]
    assert facts.judges == ("hospital-3",)
    figures = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])["sites"]
    estimate = facts.final.figures["hospital-3"]["new", "gain"]
    assert estimate.mean == figures["hospital-3"]["new.gain.mean"]
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * figures["hospital-3"]["new.gain.error"])
    both = facts.final.mean(["hospital-0", "hospital-1"], "known", "after")
    assert both is not None
    errors = [figures[f"hospital-{k}"]["known.after.error"] for k in (0, 1)]
    assert both.error == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert facts.final.mean(["nobody"], "known", "after") is None


def test_an_evaluation_in_several_goes_is_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rounds=2)
    (line,) = (json.loads(text) for text in (folder / "evaluations.jsonl").read_text().splitlines())
    sites = [*line["sites"].items()]
    goes = [{**line, "sites": dict(sites[:2]), "out": {"hospital-3": "no reply"}}, {**line, "sites": dict(sites[2:])}]
    write_lines(folder / "evaluations.jsonl", goes)
    (evaluation,) = read_facts(folder).evaluations
    assert [*evaluation.figures] == [name for name, _ in sites]
    assert evaluation.out == {}


def test_memory_and_time_hold_for_a_long_run(tmp_path: Path) -> None:
    """Rounds are arrays, not objects: 40 bytes a site and round at most."""
    import tracemalloc

    rounds, sites = 400, 100
    names = [f"h{k}" for k in range(sites)]
    lines = [
        {"round": n, "sites": {s: {"loss": 1.0, "accuracy": 0.5} for s in names}, "at": 1.0}
        for n in range(1, rounds + 1)
    ]
    folder = write_run(tmp_path, rounds=1)
    write_lines(folder / "history.jsonl", lines)
    read_facts(folder)  # imports
    tracemalloc.start()
    facts = read_facts(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert facts.history.state.shape == (rounds, sites)
    assert peak < 40 * rounds * sites + 1_000_000

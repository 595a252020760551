"""The comparison: fair in episodes and bytes, right in its intervals, the same when run again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError, RoundError, StudyError
from common.study import Study
from simulations.compare import (
    SETTINGS,
    Comparison,
    Estimate,
    Point,
    Run,
    _plan,
    _points,
    _rounds,
    compare,
    interval,
    student_t,
)
from simulations.engines.inprocess import run_in_process
from simulations.figures.curves import draw_curves
from simulations.prepare import prepare

TINY = Study().override(
    {
        "study.rounds": 2,
        "algorithm.name": "metasgd",
        "data.sites": 3,
        "sites.held-out": "hospital-2",
        "data.patients-per-class": 6,
        "model.width": 4,
        "model.image-size": 16,
        "episodes.classes": "disc,ring,cross",
        "episodes.held-out": "bar,wedge",
        "episodes.ways": 2,
        "episodes.shots": 1,
        "episodes.queries": 2,
        "episodes.per-round": 1,
        "episodes.test-episodes": 2,
        "episodes.scratch-steps": 2,
    }
)


@pytest.fixture(scope="module")
def study() -> Study:
    prepare(TINY)
    return TINY


@pytest.fixture(scope="module")
def small(study: Study) -> Comparison:
    return compare(study, ["metasgd", "fedavg", "local-only"], 2)


def made(sent: Mapping[str, int], points: Mapping[str, Mapping[int, Sequence[float]]], rounds: int = 4) -> Comparison:
    """Return a comparison from bytes a round and, by algorithm and round, every seed's accuracy on new classes."""
    study = Study().override({"study.rounds": rounds})
    runs = {}
    for name, by_round in points.items():
        seeds = range(len(next(iter(by_round.values()))))
        keys = [f"new.{moment}" for moment in ("before", "after")]
        runs[name] = tuple(
            Run(study, sent[name], tuple(Point(r, dict.fromkeys(keys, (a[i], 0.01))) for r, a in by_round.items()))
            for i in seeds
        )
    return Comparison(study, ("hospital-3",), runs)


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447), (9, 2.262), (10, 2.228), (30, 2.042)],
)
def test_student_t_is_that_of_the_tables(degrees: int, t: float) -> None:
    assert student_t(degrees) == pytest.approx(t, abs=5e-4)


def test_the_interval_over_seeds_is_their_own_spread() -> None:
    found = interval([(0.5, 9.0), (0.6, 9.0), (0.7, 9.0)])  # the error over episodes does not count
    assert found.mean == pytest.approx(0.6)
    assert found.half == pytest.approx(4.30265 * 0.1 / sqrt(3), rel=1e-5)


def test_the_interval_of_one_seed_is_that_of_its_episodes() -> None:
    assert interval([(0.5, 0.02)]) == Estimate(0.5, 1.96 * 0.02)


def test_equal_bytes_takes_the_last_evaluation_within_the_budget() -> None:
    comparison = made(
        {"maml": 100, "metasgd": 201, "protonet": 50, "anil": 500},
        {
            "maml": {2: [0.1], 4: [0.2]},
            "metasgd": {1: [0.31], 2: [0.32], 4: [0.34]},  # 402 bytes after two rounds: too many
            "protonet": {4: [0.44], 8: [0.48], 10: [0.5]},
            "anil": {2: [0.6], 4: [0.7]},
        },
    )
    assert comparison.budget == 400
    where = [(row.method, row.rounds, row.bytes_up) for row in comparison.table("bytes")]
    assert where == [("maml", 4, 400), ("metasgd", 1, 201), ("protonet", 8, 400), ("anil", None, None)]
    assert [row.rounds for row in comparison.table("rounds")] == [4, 4, 4, 4]
    assert [row.estimates["new"].mean for row in comparison.table("rounds")] == [0.2, 0.34, 0.44, 0.7]
    assert "| anil | - | - | - |" in comparison.markdown()


def test_where_none_is_held_out_the_tables_show_the_end_alone() -> None:
    """On the way other patients judge: a score of theirs must not stand beside one of the test patients."""
    made_so = made({"maml": 100, "metasgd": 200}, {"maml": {2: [0.1], 4: [0.2]}, "metasgd": {2: [0.9], 4: [0.3]}})
    assert [row.rounds for row in made_so.table("bytes")] == [4, 2]
    comparison = replace(made_so, study=made_so.study.override({"sites.held-out": ""}))
    assert [row.rounds for row in comparison.table("bytes")] == [4, None]
    assert [row.estimates["new"].mean for row in comparison.table("rounds")] == [0.2, 0.3]
    assert [rounds for rounds, _, _ in comparison.curve(comparison.methods[0], "new")] == [2, 4]


def test_a_curve_has_the_evaluations_of_all_seeds() -> None:
    comparison = made({"maml": 100}, {"maml": {1: [0.1, 0.2], 2: [0.3, 0.4], 4: [0.5, 0.7]}})
    one, two = comparison.runs["maml"]
    comparison = replace(comparison, runs={"maml": (one, replace(two, points=(two.points[0], two.points[2])))})
    curve = comparison.curve(comparison.methods[0], "new")
    assert [(rounds, estimate.mean) for rounds, _, estimate in curve] == [(1, pytest.approx(0.15)), (4, 0.6)]


def evaluation(number: int, sites: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return an evaluation of a run from every site's accuracies; the errors are a tenth of them."""
    parts = {
        site: {f"{key}.{p}": v for key, mean in means.items() for p, v in (("mean", mean), ("error", mean / 10))}
        for site, means in sites.items()
    }
    return {"round": number, "sites": parts}


def test_judges_alone_make_the_points() -> None:
    both = {"known.before": 0.1, "known.after": 0.4}
    evaluations = [
        evaluation(1, {"a": both, "b": {"known.before": 0.3, "known.after": 0.6}, "trained": {"known.after": 0.9}}),
        evaluation(2, {"a": both, "b": {"known.before": 0.5, "known.after": 0.8}}),
    ]
    one, two = _points(evaluations, ["a", "b"], "maml")
    assert one.scores["known.after"] == pytest.approx((0.5, sqrt(0.04**2 + 0.06**2) / 2))
    assert two.scores["known.before"] == pytest.approx((0.3, sqrt(0.01**2 + 0.05**2) / 2))
    assert set(one.scores) == {"known.before", "known.after"}


def test_an_evaluation_without_one_of_the_judges_is_skipped() -> None:
    known = {"known.before": 0.1, "known.after": 0.4}
    both = known | {"new.before": 0.2, "new.after": 0.3}
    evaluations = [
        evaluation(1, {"a": {}, "b": {}}),  # no validation patients anywhere
        evaluation(2, {"a": both, "b": {}}),  # none at b
        evaluation(3, {"a": known, "b": known}),  # none of the new classes at a
        evaluation(4, {"a": both}),  # b was away
        evaluation(5, {"a": both, "b": both}),
        evaluation(6, {"a": both, "b": known}),  # b never has test patients of the new classes
    ]
    points = _points(evaluations, ["a", "b"], "maml")
    assert [point.round for point in points] == [5, 6]
    assert points[0].scores["new.after"] == pytest.approx((0.3, 0.03))  # a's alone, as at the end
    with pytest.raises(RoundError, match="b gave no evaluation after round 4"):
        _points(evaluations[:4], ["a", "b"], "maml")
    with pytest.raises(DataError, match="add patients"):
        _points(evaluations[:1], ["a", "b"], "maml")


def test_what_sends_nothing_is_no_reference_and_always_affordable() -> None:
    comparison = made({"local-only": 0, "maml": 100}, {"local-only": {0: [0.4]}, "maml": {4: [0.5]}})
    assert comparison.budget == 400
    assert [row.rounds for row in comparison.table("bytes")] == [0, 4]


def test_the_best_are_those_that_overlap_it() -> None:
    best, near, far = [0.80, 0.82, 0.84], [0.76, 0.78, 0.80], [0.50, 0.52, 0.54]  # half-widths of 0.0497
    comparison = made(
        dict.fromkeys(("maml", "anil", "reptile"), 1), {"maml": {4: near}, "anil": {4: best}, "reptile": {4: far}}
    )
    assert [row.best for row in comparison.table("rounds")] == [("new",), ("new",), ()]
    text = comparison.markdown()
    assert "| anil | **82.0 ± 5.0** | 4 | 0.00 |" in text
    assert "| reptile | 52.0 ± 5.0 | 4 | 0.00 |" in text


def test_averaging_is_judged_with_and_without_fine_tuning(small: Comparison) -> None:
    assert [m.name for m in small.methods] == ["metasgd", "fedavg", "fedavg + fine-tuning", "local-only"]
    assert small.pools == ("known", "new")
    assert small.sites == ("hospital-2",)
    _, plain, tuned, _ = small.table("rounds")
    scores = [run.points[1].scores for run in small.runs["fedavg"]]
    assert plain.estimates["known"].mean == pytest.approx(sum(s["known.before"][0] for s in scores) / 2)
    assert tuned.estimates["known"].mean == pytest.approx(sum(s["known.after"][0] for s in scores) / 2)


def test_a_smaller_theta_runs_on_for_the_same_bytes(small: Comparison) -> None:
    metasgd, fedavg, alone = (runs[0] for runs in small.runs.values())
    assert [point.round for point in metasgd.points] == [1, 2]
    assert metasgd.bytes_per_round < 2 * fedavg.bytes_per_round  # fedavg's head has three classes, not two
    assert [point.round for point in fedavg.points] == [1, 2, 3]
    assert [point.round for point in alone.points] == [0]
    assert [row.rounds for row in small.table("rounds")] == [2, 2, 2, 0]
    assert [row.rounds for row in small.table("bytes")] == [2, 3, 3, 0]


def test_the_bytes_are_those_that_travel(small: Comparison) -> None:
    run = small.runs["metasgd"][0]
    _, grid = run_in_process(run.study)
    sent = [up for site, kind, _, up in grid.traffic if site == 0 and kind.startswith("train")]
    assert len(sent) == run.study.study.rounds
    assert all(0 < up - run.bytes_per_round < 5000 for up in sent)


def test_settings_hold_for_the_others_only(study: Study, small: Comparison) -> None:
    own, fedavg, alone = (runs[0].study for runs in small.runs.values())
    assert own.algorithm == study.algorithm
    assert own.outer == study.outer
    assert {key: fedavg.run_config()[key] for key in SETTINGS["fedavg"]} == SETTINGS["fedavg"]
    assert (alone.algorithm.test_steps, alone.algorithm.test_rate) == (2, study.episodes.scratch_rate)
    assert fedavg.data == study.data
    assert [run.study.study.seed for run in small.runs["fedavg"]] == [0, 1]


def test_nobody_stops_early_and_nobody_runs_on_where_no_site_is_held_out(study: Study) -> None:
    patient = study.override({"outer.patience": 2, "episodes.test-every": 1})
    assert _plan(patient, "metasgd", SETTINGS).outer.patience == 0
    fedavg = _plan(study, "fedavg", SETTINGS)
    assert _rounds(fedavg, 100, 500) == 5
    assert _rounds(fedavg.override({"sites.held-out": ""}), 100, 500) == 2


def test_withheld_figures_are_no_comparison(study: Study) -> None:
    with pytest.raises(StudyError, match=r"privacy\.figures = 'sent'"):
        compare(study.override({"privacy.figures": "withheld"}), ["metasgd"], 1)


def test_all_algorithms_have_the_same_episodes(study: Study) -> None:
    # Without a round, first order and second order are the same theta: only other episodes could part them.
    settings = {name: {"algorithm.test-rate": 0.1} for name in ("maml", "fomaml")}
    found = compare(study.override({"study.rounds": 0}), ["maml", "fomaml"], 2, settings=settings).runs
    assert found["maml"][0].study.digest != found["fomaml"][0].study.digest
    assert [r.points for r in found["maml"]] == [r.points for r in found["fomaml"]]
    assert found["maml"][0].points != found["maml"][1].points


def test_json_is_plain_and_the_same_again(study: Study, small: Comparison) -> None:
    text = json.dumps(small.json(), sort_keys=True, allow_nan=False)
    answer = json.loads(text)
    assert answer == small.json()
    assert answer["study"] == study.digest
    assert answer["algorithms"]["fedavg"]["settings"]["outer.rate"] == 1.0
    assert [run["seed"] for run in answer["algorithms"]["fedavg"]["runs"]] == [0, 1]
    assert answer["algorithms"]["fedavg"]["runs"][1]["points"][0]["scores"]["new.after"].keys() == {"mean", "error"}
    once, again = (compare(study.override({"study.rounds": 1}), ["protonet"], 2).json() for _ in range(2))
    assert once == again


def test_only_progress_is_said(study: Study, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    compare(study.override({"study.rounds": 1}), ["protonet"], 1, progress=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("protonet, seed 0: known classes ")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("algorithms", "seeds", "says"),
    [
        (["metasgd", "mmal"], 1, r"'mmal'"),
        (["metasgd", "metasgd"], 1, "once each"),
        ([], 1, "algorithms"),
        (["metasgd"], 0, "at least one seed"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(study: Study, algorithms: list[str], seeds: int, says: str) -> None:
    lines: list[str] = []
    with pytest.raises(StudyError, match=says):
        compare(study, algorithms, seeds, progress=lines.append)
    assert not lines


def test_too_few_patients_to_judge_by_are_an_error(study: Study) -> None:
    few = study.override({"data.patients-per-class": 1, "episodes.classes": "disc,ring", "episodes.held-out": ""})
    prepare(few)
    with pytest.raises(DataError, match="add patients"):
        compare(few, ["local-only"], 1)


@pytest.mark.parametrize(("rounds", "every"), [(20, 2), (100, 10), (200, 25), (150, 15), (97, 13), (7, 1), (1, 0)])
def test_about_eight_evaluations_a_run(rounds: int, every: int) -> None:
    from simulations.compare import _every

    assert _every(Study().override({"study.rounds": rounds})) == every
    assert _every(Study().override({"study.rounds": rounds, "episodes.test-every": 5})) == 5


def test_curves_are_one_whole_picture(small: Comparison, tmp_path: Path) -> None:
    draw_curves(small, tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    one = made({"maml": 100}, {"maml": {1: [0.5]}}, rounds=1)
    draw_curves(one, tmp_path / "curves.png")


def test_labels_do_not_overlap() -> None:
    from simulations.figures.curves import _spread

    places = _spread([50.0, 50.1, 50.2, 50.2, 80.0, 99.9], 4.0, 40.0, 98.0)
    assert all(b - a >= 4.0 - 1e-6 for a, b in pairwise(places))
    assert places[0] >= 40
    assert places[-1] <= 98
    assert places[-2] == 80

"""The rule of a study at work: which rule it is, what it refuses, and what it keeps between rounds."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import ContractError, RoundError, StudyError
from common.study import Aggregation
from server.aggregation import Aggregator, sites_needed
from server.aggregation.clipping import CentredClipping, clipped_mean, norm
from server.aggregation.krum import krum, multi_krum
from server.aggregation.trimmed import median, trimmed_mean
from tests.server.aggregation.replies import PLANS, ROBUST, Rows, a_plan, some_rows


def aggregate(plan: Aggregation, rows: NDArray[Any]) -> Rows:
    sites = [f"ward {i}" for i in range(len(rows))]
    aggregator = Aggregator(plan, rows.shape[1], sites)
    for site, row in zip(sites, rows, strict=True):
        aggregator.add(site, row)
    return aggregator.result()


def test_every_rule_of_a_study_is_the_rule_of_that_name() -> None:
    rows = np.random.default_rng(7).normal(size=(7, 6))
    centre = np.zeros(6)
    truth = {
        "mean": rows.mean(axis=0),
        "median": median(rows, 1),
        "trimmed-mean": trimmed_mean(rows, 1),
        "krum": krum(rows, 1),
        "multi-krum": multi_krum(rows, 1, 2),
        "centred-clipping": clipped_mean(rows, centre, 0.25, 8),
    }
    for rule, expected in truth.items():
        np.testing.assert_allclose(aggregate(a_plan(rule), rows), expected, rtol=1e-14, err_msg=rule)
    assert len({tuple(np.round(v, 9)) for v in truth.values()}) == len(truth)
    more = {"trimmed-mean": trimmed_mean(rows, 2), "krum": krum(rows, 2), "multi-krum": multi_krum(rows, 2, 3)}
    for rule, expected in more.items():
        changes = {"tolerated": 2} | ({"selected": 3} if rule == "multi-krum" else {})
        np.testing.assert_array_equal(aggregate(a_plan(rule, **changes), rows), expected)
    one = aggregate(a_plan("centred-clipping", radius=0.5, iterations=2), rows)
    np.testing.assert_array_equal(one, clipped_mean(rows, centre, 0.5, 2))


@pytest.mark.parametrize("rule", [rule for rule in PLANS if rule != "centred-clipping"])
@settings(max_examples=60)
@given(case=some_rows(least=lambda f: 5, most_hostile=1), data=st.data())
def test_a_shift_of_all_replies_shifts_the_result(rule: str, case: tuple[Rows, int], data: st.DataObject) -> None:
    rows, _ = case
    shift = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=rows.shape[1], max_size=rows.shape[1])), float)
    np.testing.assert_allclose(aggregate(a_plan(rule), rows + shift), aggregate(a_plan(rule), rows) + shift, atol=1e-12)


@pytest.mark.parametrize("rule", PLANS)
def test_float32_replies_are_computed_with_in_float64(rule: str) -> None:
    rows = np.random.default_rng(8).normal(size=(6, 9)).astype(np.float32)
    ours = aggregate(a_plan(rule), rows)
    assert ours.dtype == np.float64
    np.testing.assert_array_equal(ours, aggregate(a_plan(rule), rows.astype(np.float64)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", ROBUST)
def test_numbers_whose_squares_overflow_are_far_and_no_more(rule: str) -> None:
    rows = np.ones((5, 3))
    rows[2] = 1e300
    assert norm(aggregate(a_plan(rule, **{"max-norm": 0.0}), rows)) < 3


@pytest.mark.parametrize(
    ("rule", "changes", "least", "formula"),
    [
        ("mean", {}, 1, ""),
        ("median", {}, 3, "2f + 1"),
        ("median", {"tolerated": 4}, 9, "2f + 1"),
        ("trimmed-mean", {"tolerated": 2}, 5, "2f + 1"),
        ("krum", {}, 5, "2f + 3"),
        ("krum", {"tolerated": 3}, 9, "2f + 3"),
        ("multi-krum", {}, 5, "2f + 3"),
        ("multi-krum", {"tolerated": 2, "selected": 3}, 7, "2f + 3"),
        ("multi-krum", {"tolerated": 1, "selected": 6}, 9, "aggregation.selected + f + 2"),
        ("centred-clipping", {"tolerated": 2}, 5, "2f + 1"),
    ],
)
def test_too_few_sites_are_refused_before_and_in_a_round(
    rule: str, changes: dict[str, Any], least: int, formula: str
) -> None:
    plan = a_plan(rule, **changes)
    assert sites_needed(plan) == least
    sites = [str(i) for i in range(least + 1)]
    if least > 1:
        with pytest.raises(RoundError) as error:
            Aggregator(plan, 2, sites[: least - 1])
        assert f"{least - 1} sites are too few: the rule {rule} needs {least} to" in str(error.value)
        assert f"f = {plan.tolerated} hostile" in str(error.value)
        assert formula in str(error.value)
    aggregator = Aggregator(plan, 2, sites)
    for site in sites[: least - 1]:
        aggregator.add(site, np.ones(2))
    kept = {name: value.tolist() for name, value in aggregator.state().items()}
    with pytest.raises(RoundError, match=f"{least - 1} sites are too few"):
        aggregator.result()
    assert {name: value.tolist() for name, value in aggregator.state().items()} == kept
    aggregator.begin(sites)
    for site in sites[1:]:
        aggregator.add(site, np.ones(2))
    assert aggregator.count == least
    assert norm(aggregator.result()) > 0


@pytest.mark.parametrize("rule", PLANS)
def test_a_round_begins_with_nothing_of_the_one_before(rule: str) -> None:
    rows = np.random.default_rng(9).normal(size=(6, 4))
    fresh = aggregate(a_plan(rule), rows)
    sites = [f"ward {i}" for i in range(6)]
    aggregator = Aggregator(a_plan(rule), 4, sites)
    for site in sites[1:4]:
        aggregator.add(site, np.full(4, 77.0))
    assert aggregator.count == 3
    aggregator.begin(sites)  # a new attempt
    assert aggregator.count == 0
    for site, row in zip(sites, rows, strict=True):
        aggregator.add(site, row)
    np.testing.assert_array_equal(aggregator.result(), fresh)
    aggregator.begin(sites)
    with pytest.raises(RoundError, match="0 sites are too few"):
        aggregator.result()  # no reply counts twice


@pytest.mark.parametrize("rule", PLANS)
def test_a_restored_aggregator_goes_on_with_the_same_bits(rule: str) -> None:
    generator = np.random.default_rng(10)
    sites = [f"ward {i}" for i in range(6)]
    first, second = (Aggregator(a_plan(rule), 4, sites) for _ in range(2))

    def a_round(aggregator: Aggregator, rows: Rows) -> Rows:
        aggregator.begin(sites)
        for site, row in zip(sites, rows, strict=True):
            aggregator.add(site, row)
        return aggregator.result()

    for _ in range(2):
        a_round(first, generator.normal(size=(6, 4)))
    state = first.state()
    second.restore(state)
    for values in state.values():
        values[:] = 77  # what was given away is a copy, in both directions
    assert (state != {}) == (rule == "centred-clipping")
    for _ in range(2):
        rows = generator.normal(size=(6, 4))
        one, other = a_round(first, rows), a_round(second, rows)
        np.testing.assert_array_equal(one, other)
        one[:] = 77


def test_a_studys_momentum_is_kept_by_the_name_of_the_site() -> None:
    generator = np.random.default_rng(12)
    sites = ["a", "b", "c", "d"]
    aggregator = Aggregator(a_plan("centred-clipping", momentum=0.9), 3, sites)
    alone = CentredClipping(3, radius=0.25, iterations=8, momentum=0.9)
    for there in (sites, ["a", "c", "d"], ["b", "c", "d"]):
        rows = generator.normal(size=(len(there), 3))
        aggregator.begin(sites)
        for site, row in zip(there, rows, strict=True):
            aggregator.add(site, row)
        np.testing.assert_array_equal(aggregator.result(), alone.step(there, rows))


def test_replies_come_in_the_order_of_the_sites_each_once() -> None:
    aggregator = Aggregator(Aggregation(), 2, ["a", "b", "c"])
    aggregator.add("b", np.zeros(2))
    for site in ("a", "b"):
        with pytest.raises(ValueError, match=f"{site} after b"):
            aggregator.add(site, np.zeros(2))
    with pytest.raises(ValueError, match="broadcast"):
        aggregator.add("c", np.zeros(1))
    aggregator.add("c", np.ones(2))
    np.testing.assert_array_equal(aggregator.result(), [0.5, 0.5])


@pytest.mark.parametrize("rule", PLANS)
def test_a_reply_beyond_the_bound_does_not_count(rule: str) -> None:
    sites = [f"ward {i}" for i in range(6)]
    aggregator = Aggregator(a_plan(rule, **{"max-norm": 5.0}), 2, sites)
    aggregator.add(sites[0], np.array([3.0, 4.0], np.float32))  # on the bound
    for beyond in ([3.0, 4.000001], [1e30, 0.0], [-3e38, 3e38]):
        with pytest.raises(ContractError, match=r"above aggregation\.max-norm, 5$"):
            aggregator.add(sites[1], np.array(beyond, np.float32))
    for site in sites[2:]:
        aggregator.add(site, np.array([3.0, 4.0]))
    assert aggregator.count == 5
    if rule != "centred-clipping":
        np.testing.assert_allclose(aggregator.result(), [3, 4])


def test_weights_are_those_of_the_study() -> None:
    plan = Aggregation(weights="ward 0=2, ward 1 = 1e-1 ,elsewhere=7")
    aggregator = Aggregator(plan, 1, ["ward 0", "ward 1"])
    for site, value in (("ward 0", 1.0), ("ward 1", 4.0)):
        aggregator.add(site, np.array([value], np.float32))
    np.testing.assert_allclose(aggregator.result(), [(2 + 0.4) / 2.1], rtol=1e-15)
    aggregator.begin(["ward 0", "ward 1"])
    aggregator.add("ward 1", np.array([4.0], np.float32))  # of who is there
    np.testing.assert_allclose(aggregator.result(), [4.0], rtol=1e-15)
    with pytest.raises(StudyError, match=r"aggregation\.weights gives no weight to ward 2, ward 3: name every site"):
        Aggregator(plan, 1, ["ward 0", "ward 2", "ward 3"])


def test_equal_weights_change_no_bit() -> None:
    vectors = np.random.default_rng(1).normal(size=(5, 50)).astype(np.float32)
    plain = np.zeros(50)
    for vector in vectors:
        plain += vector
    sites = [f"ward {i}" for i in range(5)]
    aggregator = Aggregator(Aggregation(), 50, sites)
    for site, vector in zip(sites, vectors, strict=True):
        aggregator.add(site, vector)
    np.testing.assert_array_equal(aggregator.result(), plain / 5)


def test_memory_of_the_mean_does_not_grow_with_the_sites_and_the_others_is_their_replies() -> None:
    size = 50_000

    def peak(rule: str, count: int) -> float:
        sites = [str(i) for i in range(count)]
        tracemalloc.start()
        aggregator = Aggregator(a_plan(rule), size, sites)
        for site in sites:
            aggregator.add(site, np.ones(size, np.float32))
        aggregator.result()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most / (8 * size)

    assert peak("mean", 60) < 1.05 * peak("mean", 6) < 4
    assert 20 <= peak("trimmed-mean", 20) < 45

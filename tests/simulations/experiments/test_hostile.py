"""Sites that lie: what they change, that a mean is ruined by them, and that a robust rule is not."""

import numpy as np
import pytest

from common.errors import RoundError
from common.study import Study
from simulations.experiments import hostile
from simulations.experiments.hostile import ATTACKS, RULES, Liar, Run, measure, words
from tests.client.hospitals import ask, enter_run, instruct, prepared, tiny_study

TINY = Study().override(
    {
        "study.rounds": 4,
        "sites.held-out": "",
        "algorithm.name": "fomaml",
        "data.sites": 3,
        "data.patients-per-class": 6,
        "model.width": 4,
        "model.image-size": 16,
        "episodes.labels": "fixed",
        "episodes.classes": "disc,ring,cross",
        "episodes.held-out": "",
        "episodes.ways": 3,
        "episodes.shots": 1,
        "episodes.queries": 2,
        "episodes.test-episodes": 4,
        "episodes.scratch-steps": 0,
        "outer.optimiser": "sgd",
        "outer.clip": 0.0,
    }
)


def test_a_liar_changes_its_vector_and_nothing_else() -> None:
    study = tiny_study()
    prepared(study)
    enter_run()
    instruction, theta = instruct(study, "train")
    client = Liar(1, lambda honest: -2 * honest)
    for site, factor in ((0, -2), (1, 1)):
        truth = ask(study, site, instruction, theta).content
        said = ask(study, site, instruction, theta, client=client).content
        vectors = [content.array_records["meta_gradient"]["meta_gradient"].numpy() for content in (truth, said)]
        np.testing.assert_array_equal(vectors[1], factor * vectors[0])
        assert dict(said.metric_records["scalars"]) == dict(truth.metric_records["scalars"])
        instruction_join, _ = instruct(study, "join")
        assert ask(study, site, instruction_join, None, client=client).has_content()


def test_the_drift_stays_within_its_bound_and_goes_one_way() -> None:
    drift, bound = ATTACKS["drift within the bound"]
    assert drift is not None
    first, second = (drift(np.random.default_rng(i).normal(size=50).astype(np.float32)) for i in range(2))
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert 0.95 * bound < np.linalg.norm(first) < bound


@pytest.mark.slow
def test_one_liar_of_three_ruins_the_mean_and_no_robust_rule() -> None:
    attack = "a million times"
    runs = measure(TINY, 1, ["mean", "median", "trimmed-mean", "centred-clipping"], [attack], 1)
    accuracies = {run.rule: run.accuracy for run in runs}
    assert accuracies.pop("mean") is None  # theta is not finite any more
    assert all(accuracy is not None and 0 <= accuracy <= 1 for accuracy in accuracies.values())


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mean"])
def test_too_many_liars_for_the_sites_are_refused_before_anything_runs(rule: str) -> None:
    with pytest.raises(RoundError, match=f"3 sites are too few: the rule {rule} needs"):
        next(measure(TINY, 2, ["mean", rule], ["nobody lies"], 1))


def test_a_run_that_is_known_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int, float]] = []

    def accuracy(plan: Study, liars: int, change: object) -> float:
        done.append((plan.aggregation.rule, plan.study.seed, plan.aggregation.max_norm))
        return 0.5

    monkeypatch.setattr(hostile, "_accuracy", accuracy)
    monkeypatch.setattr(hostile, "prepare", lambda study: [])
    rules, attacks = ["mean", "median"], ["nobody lies", "drift within the bound"]
    first = list(measure(TINY, 1, rules, attacks, 1))
    assert done == [(rule, 0, bound) for rule in rules for bound in (0.0, hostile._CLIP)]
    done.clear()
    again = list(measure(TINY, 1, rules, attacks, 2, first))
    assert again[:4] == first
    assert done == [(rule, 1, bound) for rule in rules for bound in (0.0, hostile._CLIP)]
    done.clear()
    other = TINY.override({"study.rounds": 5})
    assert len(list(measure(other, 1, rules, attacks, 1, again))) == len(done) == 4


def runs_of(accuracies: dict[str, list[float | None]]) -> list[Run]:
    return [
        Run("", 1, "median", attack, seed, accuracy)
        for attack, by_seed in accuracies.items()
        for seed, accuracy in enumerate(by_seed)
    ]


def test_what_an_attack_costs_is_paired_by_seed_with_its_interval() -> None:
    runs = runs_of(
        {
            "nobody lies": [0.9, 0.8, 0.7],
            "signs flipped": [0.89, 0.77, 0.68],  # -1, -3 and -2 points: t = 4.303 with two degrees of freedom
            "a million times": [0.9, None, 0.7],
            "drift within the bound": [0.89, 0.79, 0.69],
        }
    )
    assert words(runs, "nobody lies") == "80.0"
    assert words(runs, "signs flipped") == "78.0 (-2.0 ± 2.5)"
    assert words(runs, "a million times") == "ruined"
    assert words(runs, "drift within the bound") == "79.0 (-1.0 ± 0.0, holds)"
    single = runs_of({"nobody lies": [0.9], "signs flipped": [0.95]})
    assert words(single, "signs flipped") == "95.0 (+5.0)"

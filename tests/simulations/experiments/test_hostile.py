"""Sites that lie: what they change, that a mean is ruined by them, and that a robust rule is not."""

import numpy as np
import pytest

from common.errors import RoundError
from common.study import Study
from simulations.experiments.hostile import ATTACKS, RULES, Liar, measure
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
    results = measure(TINY, 1, ["mean", "median", "trimmed-mean", "centred-clipping"], [attack], 1)
    accuracies = {r["rule"]: r["accuracies"] for r in results}
    assert accuracies.pop("mean") == [None]  # theta is not finite any more
    assert all(0 <= accuracy <= 1 for (accuracy,) in accuracies.values())


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mean"])
def test_too_many_liars_for_the_sites_are_refused_before_anything_runs(rule: str) -> None:
    with pytest.raises(RoundError, match=f"3 sites are too few: the rule {rule} needs"):
        measure(TINY, 2, ["mean", rule], ["nobody lies"], 1)

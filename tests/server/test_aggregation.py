"""Aggregation over the grid: seven sites train, and two of them may be hostile."""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from safetensors.torch import load_file

from common.contract import Instruction, Vector, pack_reply
from common.errors import RoundError, StudyError
from common.meta import flatten
from common.study import Study
from server.aggregation import explain_need
from server.aggregation.clipping import norm
from server.record import RunRecord
from server.rounds import initial_theta
from simulations.engines.inprocess import Fault
from tests.server.aggregation.replies import ROBUST
from tests.server.scripted import Spoil, a_grid, a_study, run

RUNS = itertools.count(2 * 10**6)


HOSTILE = (1, 4)
ATTACKS: Mapping[str, Callable[[Vector], Vector]] = {
    "scales": lambda g: g * np.float32(1e6),
    "flips signs": lambda g: -3 * g,
    "drifts": lambda g: g + np.float32(2) / np.sqrt(g.size, dtype=np.float32),
}
#: For two hostile sites of seven.
OF_SEVEN: Mapping[str, Mapping[str, Any]] = {
    "mean": {},
    "median": {},
    "trimmed-mean": {},
    "krum": {},
    "multi-krum": {"aggregation.selected": 3},
    "centred-clipping": {
        "aggregation.radius": 0.1,
        "aggregation.iterations": 30,
        "aggregation.momentum": 0.1,
    },
}


def seven(rule: str, **more: Any) -> Study:
    robust = {"aggregation.tolerated": 2} if rule != "mean" else {}
    return a_study(
        {
            "data.sites": 8,
            "sites.held-out": "hospital-7",
            "study.rounds": 4,
            "outer.optimiser": "sgd",
            "outer.rate": 0.5,
            "aggregation.rule": rule,
            **robust,
            **OF_SEVEN[rule],
            **more,
        }
    )


def theta_of(record: RunRecord, study: Study) -> Vector:
    tensors = load_file(record.folder / "theta.safetensors")
    vector: Vector = flatten({name: tensors[name] for name in initial_theta(study)}).numpy()
    return vector


def goal_of(study: Study) -> Vector:
    """Return a theta at distance 1 from the initial one."""
    start = flatten(initial_theta(study)).numpy()
    step = np.random.default_rng(11).normal(size=start.size)
    goal: Vector = (start + step / norm(step)).astype(np.float32)
    return goal


def towards(goal: Vector, attack: Callable[[Vector], Vector] | None = None) -> Spoil:
    """Let sites answer with the gradient of half the squared distance to a goal, and a little noise."""

    def spoil(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict:
        if instruction.kind != "train":
            return content
        noise = np.random.default_rng([site, instruction.round]).normal(size=goal.size)
        theta = message.content.array_records["theta"]["theta"].numpy()
        gradient: Vector = (theta - goal + 0.01 * noise / norm(noise)).astype(np.float32)
        if attack and site in HOSTILE:
            gradient = attack(gradient)
        return pack_reply(instruction, {"loss": 1.0, "accuracy": 0.5}, gradient)

    return spoil


def distance_left(rule: str, attack: str | None) -> float:
    """Return how far theta is from the goal at the end of a run, 1 being the start."""
    study = seven(rule)
    goal = goal_of(study)
    spoil = towards(goal, ATTACKS[attack] if attack else None)
    return norm(theta_of(run(study, a_grid(study, spoil=spoil), next(RUNS)), study) - goal)


@pytest.mark.parametrize("rule", ROBUST)
def test_with_hostile_sites_robust_rules_arrive(rule: str) -> None:
    clean = distance_left(rule, None)
    assert clean < 0.15
    for attack in ATTACKS:
        assert abs(distance_left(rule, attack) - clean) < 0.1, attack


@pytest.mark.parametrize("attack", ATTACKS)
def test_with_hostile_sites_the_mean_does_not_arrive(attack: str) -> None:
    clean = distance_left("mean", None)
    assert clean < 0.15
    assert distance_left("mean", attack) > clean + 0.4


def only_in_round(number: int, site: int) -> Fault:
    def fault(who: int, message: Message) -> str | None:
        asked = message.content.config_records["instruction"]
        return "crash" if (who, asked["kind"], asked["round"]) == (site, "train", number) else None

    return fault


def test_a_reply_beyond_the_bound_is_one_rejection() -> None:
    study = seven("mean", **{"aggregation.max-norm": 100.0})
    goal = goal_of(study)

    def one_loud_site(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict:
        attack = ATTACKS["scales"] if (site, instruction.round) == (4, 2) else None
        return towards(goal, attack)(site, instruction, content, message)  # type: ignore[return-value]

    said: list[str] = []
    record = run(study, a_grid(study, spoil=one_loud_site), next(RUNS), said)
    without = run(study, a_grid(study, spoil=towards(goal), fault=only_in_round(2, 4)), next(RUNS))
    np.testing.assert_array_equal(theta_of(record, study), theta_of(without, study))
    assert any("out: hospital-4 (the meta-gradient's norm is above aggregation.max-norm, 100)" in line for line in said)
    assert sum("out:" in line for line in said) == 1
    lines = [json.loads(line) for line in (record.folder / "history.jsonl").read_text().splitlines()]
    assert [refusal["code"] for line in lines for refusal in line["out"]] == [102]
    assert [set(line["sites"]) for line in lines] == [
        {f"hospital-{i}" for i in range(7) if (number, i) != (2, 4)} for number in range(1, 5)
    ]


def test_weights_of_the_study_reach_theta() -> None:
    weights = {f"hospital-{i}": float(1 + i) for i in range(7)}
    text = ",".join(f"{site}={weight}" for site, weight in weights.items())
    study = seven("mean", **{"aggregation.weights": text, "study.rounds": 1})
    record = run(study, a_grid(study), next(RUNS))
    start = flatten(initial_theta(study)).numpy()
    vectors = [np.random.default_rng([i, 1]).normal(0, 1, start.size).astype(np.float32) for i in range(7)]
    truth = start - 0.5 * np.average(np.array(vectors, np.float64), axis=0, weights=[*weights.values()])
    np.testing.assert_allclose(theta_of(record, study), truth, atol=1e-6)
    study = seven("mean", **{"aggregation.weights": text.replace("hospital-3", "hospital-33")})
    with pytest.raises(StudyError, match="gives no weight to hospital-3: name"):
        run(study, a_grid(study), next(RUNS))


def test_a_run_with_too_few_sites_for_the_rule_does_not_start() -> None:
    study = a_study({"aggregation.rule": "krum", "aggregation.tolerated": 1})
    grid = a_grid(study)
    with pytest.raises(RoundError) as error:
        run(study, grid, next(RUNS))
    assert "3 training sites joined, the rule krum needs 5 to withstand f = 1 hostile ones (2f + 3;" in str(error.value)
    assert {kind for _, kind, _, _ in grid.traffic} == {"query.join"}


def test_a_round_with_too_few_replies_for_the_rule_fails() -> None:
    study = seven("krum")
    grid = a_grid(study, spoil=towards(goal_of(study)), fault=only_in_round(2, 5))
    with pytest.raises(RoundError) as error:
        run(study, grid, next(RUNS))
    assert f"6 training sites gave a valid reply in round 2, {explain_need(study.aggregation)}" in str(error.value)
    assert "hospital-5: the site went away" in str(error.value)

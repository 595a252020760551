"""`wardround-study plan`: the numbers are the accountant's, and a person can read them."""

import json
from math import sqrt
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.meta import flatten
from common.privacy.accounting import Rounds, epsilon
from common.study import Study
from server.cli import app
from server.plan import facts_of, in_words
from server.rounds import initial_theta

PRIVATE: dict[str, bool | int | float | str] = {
    "study.id": "private",
    "study.rounds": 100,
    "model.width": 4,
    "model.image-size": 16,
    "episodes.per-round": 8,
    "sites.quorum": 3,
    "privacy.mechanism": "episode-clip",
    "privacy.clip": 0.5,
    "privacy.noise": 1.1,
    "privacy.sampling": 0.05,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}


def study(**changes: bool | int | float | str) -> Study:
    return Study.from_run_config(PRIVATE | {key.replace("__", "."): value for key, value in changes.items()})


def test_the_numbers_are_those_of_the_mechanism() -> None:
    plan = study()
    facts = facts_of(plan, [3.0], patients=400)
    size = flatten(initial_theta(plan)).numel()
    assert facts["epsilon"]["study"] == pytest.approx(2.8868, abs=1e-3)
    assert facts["epsilon"]["study"] < facts["epsilon"]["study_by_renyi_at_most"]
    assert facts["epsilon"]["study"] < facts["epsilon"]["study_if_replaced_at_most"]
    assert 0 < facts["epsilon"]["round"] < facts["epsilon"]["study"]
    assert facts["sensitivity"] == 2 * 0.5  # an episode turns round: twice the bound, not once
    assert facts["noise_deviation"] == pytest.approx(1.1)
    # Eight vectors of norm 0.5 in one direction, against noise of 1.1 in every one of D numbers.
    assert facts["signal_to_noise"]["site"] == pytest.approx(8 * 0.5 / (1.1 * sqrt(size)))
    assert facts["signal_to_noise"]["quorum"] == pytest.approx(sqrt(3) * facts["signal_to_noise"]["site"])
    assert facts["rounds_of_a_patient"] == pytest.approx(5)
    assert facts["patients"] == {
        "site": 400,
        "round": pytest.approx(20),
        "episode": pytest.approx(2.5),
        "delta_is_small": True,
    }
    noise = facts["noise_for"]["3"]
    assert epsilon([Rounds(0.05, noise, 100)], 1e-5) == pytest.approx(3, rel=0.005)


BY_PATIENT: dict[str, bool | int | float | str] = {
    "algorithm.name": "maml",
    "algorithm.inner-steps": 2,
    "algorithm.inner-rate": 0.1,
    "model.norm": "group",
    "episodes.labels": "fixed",
    "episodes.classes": "a,b,c",
    "episodes.held-out": "",
    "episodes.ways": 3,
    "episodes.shots": 4,
    "episodes.queries": 10,
    "episodes.per-round": 1,
    "privacy.mechanism": "patient-clip",
}


def test_the_numbers_are_those_of_patient_clip_too(tmp_path: Path) -> None:
    plan = Study.from_run_config(PRIVATE | BY_PATIENT)
    facts = facts_of(plan, [3.0], patients=840)
    size = flatten(initial_theta(plan)).numel()
    assert facts["epsilon"] == facts_of(study(), [3.0])["epsilon"]  # noise is in sensitivities with both
    assert facts["sensitivity"] == 0.5  # a patient's term is there or not
    assert facts["noise_deviation"] == pytest.approx(0.55)
    assert facts["sums"]["support_noise"] == pytest.approx(0.55 * 2)  # a support patient is in four sums
    assert (facts["sums"]["support_patients"], facts["sums"]["query_patients"]) == (12, 30)
    ratio = facts["signal_to_noise"]
    assert ratio["inner"] == pytest.approx(12 * 0.5 / (1.1 * sqrt(size)))
    deviation = sqrt((0.55 / 30) ** 2 + 2 * (0.1 * 1.1 / 12) ** 2)
    assert ratio["site"] == pytest.approx(0.5 * (1 + 2 * 0.1) / (deviation * sqrt(size)))
    assert ratio["quorum"] == pytest.approx(sqrt(3) * ratio["site"])
    text = run(tmp_path, plan, "--patients", "840")
    assert "epsilon 2.89 at delta 1e-05 for every patient of a site over 100 rounds (patient-clip" in text
    assert "deviation 0.55 on the sum of queries, 1.1 on each other one" in text
    assert "with 840 patients: 42 in a round on average; the study's shots and queries are for 42" in text


def test_the_first_order_says_what_it_takes() -> None:
    plan = Study.from_run_config(PRIVATE | BY_PATIENT | {"algorithm.name": "fomaml"})
    text = "\n".join(in_words(plan, facts_of(plan, [3.0])))
    assert "sums over patients, 2 inner, one of queries" in text


def run(tmp_path: Path, plan: Study, *arguments: str) -> str:
    file = tmp_path / "study.toml"
    file.write_text(plan.toml(), encoding="utf-8")
    result = CliRunner().invoke(app, ["plan", str(file), *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_what_the_numbers_are(tmp_path: Path) -> None:
    plan = study(privacy__sampling=1.0, privacy__noise=8.0)
    text = run(tmp_path, plan, "--epsilon", "8", "--patients", "20000")
    assert "epsilon 5.68 at delta 1e-05 for every patient of a site over 100 rounds (episode-clip" in text
    assert "11.36 at most, where a patient is replaced" not in text  # not twice epsilon: twice mu
    assert "epsilon 8        needs privacy.noise = 6." in text
    assert "warning: delta should be below 1 / (10 x patients), 5e-06" in text
    assert json.loads(run(tmp_path, plan, "--json")) == facts_of(plan, [1.0, 3.0, 8.0])


def test_without_a_mechanism_it_says_so(tmp_path: Path) -> None:
    text = run(tmp_path, Study())
    assert "no formal guarantee (privacy.mechanism = 'none')" in text
    assert "epsilon" not in text
    facts = json.loads(run(tmp_path, Study(), "--json"))
    assert not facts["guaranteed"]
    assert "epsilon" not in facts


def test_the_research_switch_voids_the_guarantee() -> None:
    plan = study(privacy__research=True)
    facts = facts_of(plan, [3.0])
    lines = list(in_words(plan, facts))
    assert not facts["guaranteed"]
    assert "no formal guarantee (privacy.research" in lines[1]
    assert "without privacy.research" in lines[2]

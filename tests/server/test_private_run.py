"""A private study from its first round to its result: real server, real clients, real noise."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from client.data.store import Site
from client.ledger import Limit, open_ledger
from common.errors import BudgetError
from common.study import Study
from server.record import run_folder
from simulations.engines.inprocess import run_in_process
from tests.client.hospitals import prepared, tiny_study

Changes = dict[str, bool | int | float | str]

PRIVATE: Changes = {
    "study.rounds": 3,
    "episodes.per-round": 4,
    "privacy.mechanism": "episode-clip",
    "privacy.clip": 0.5,
    "privacy.noise": 1.1,
    "privacy.sampling": 0.5,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}


BY_PATIENT: Changes = {
    **PRIVATE,
    "privacy.mechanism": "patient-clip",
    "algorithm.name": "maml",
    "model.norm": "group",
    "episodes.labels": "fixed",
    "episodes.held-out": "",
    "episodes.per-round": 1,
}


@pytest.fixture(params=[PRIVATE, BY_PATIENT], ids=["episode-clip", "patient-clip"])
def private(request: pytest.FixtureRequest) -> Changes:
    """A study by each of the mechanisms."""
    changes: Changes = request.param
    return changes


@pytest.fixture
def hospitals(private: Changes) -> Iterator[list[Site]]:
    """The prepared hospitals, nothing spent."""
    sites = prepared(tiny_study(private))
    ledgers = [site.folder / "ledger.sqlite" for site in sites]
    for ledger in ledgers:
        ledger.unlink(missing_ok=True)
    yield sites
    for ledger in ledgers:
        ledger.unlink(missing_ok=True)


def history(study: Study, capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], str]:
    run_id, _ = run_in_process(study)
    lines = (run_folder(run_id) / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], capsys.readouterr().out


def test_a_private_study_ends_with_a_result(
    hospitals: list[Site], private: Changes, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, said = history(tiny_study(private), capsys)
    assert f"at delta 1e-05 for every patient of a site over 3 rounds ({private['privacy.mechanism']}" in said
    for line in lines:
        assert line["sites"] == {f"hospital-{i}": {"loss": -1.0, "accuracy": -1.0} for i in range(3)}
    for site in hospitals[:3]:
        with open_ledger(site.folder) as ledger:
            (spent,) = ledger.spent()
            assert (spent.rounds.sampling, spent.rounds.noise, spent.rounds.count) == (0.5, 1.1, 3)
            assert not ledger.without_guarantee()


def test_a_site_without_budget_is_named_and_the_others_go_on(
    hospitals: list[Site], private: Changes, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_ledger(hospitals[0].folder) as ledger:
        ledger.set_limit(Limit(0.01, 1e-5))
    lines, _ = history(tiny_study({**private, "study.seed": 1, "sites.rest-after": 100}), capsys)
    assert len(lines) == 3
    for line in lines:
        (out,) = line["out"]
        assert (out["site"], out["code"]) == ("hospital-0", BudgetError.code)
        assert out["reason"].startswith("the privacy budget of a site's patients does not allow")


def test_with_the_research_switch_the_same_study_gives_the_same_theta(
    hospitals: list[Site], private: Changes, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tiny_study({**private, "privacy.research": True, "privacy.figures": "sent"})
    thetas = []
    for _ in range(2):
        run_id, _ = run_in_process(study)
        thetas.append(json.loads((run_folder(run_id) / "result.json").read_text())["theta"])
    assert thetas[0] == thetas[1]
    assert "no formal guarantee (privacy.research" in capsys.readouterr().out
    with open_ledger(hospitals[0].folder) as ledger:
        assert ledger.without_guarantee() == [study.digest]

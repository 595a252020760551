"""Evaluation at a site: the declared figures, recomputed episode by episode."""

from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch

from client import evaluation
from client.data.episodes import draw
from client.data.store import Site
from client.evaluation import evaluate
from client.session import Session, open_session
from common.contract import EVALUATION
from common.meta import Engine, Episodes
from common.study import Study
from tests.client.hospitals import instruct


@pytest.fixture(scope="module")
def session(study: Study, sites: list[Site]) -> Session:
    changes: dict[str, bool | int | float | str] = {"episodes.test-episodes": 6, "algorithm.test-steps": 3}
    return open_session(study.override(changes).run_config(), {"partition-id": 1})


def accuracies(engine: Engine, theta: dict[str, torch.Tensor], episodes: Episodes, steps: int) -> list[float]:
    """Return the accuracy on every episode, each by itself."""
    return [
        float(engine.scores(theta, episodes.take(slice(t, t + 1)), steps).accuracy) for t in range(episodes.n_tasks)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Episodes]:
    """The episodes that are drawn for an evaluation: of the known classes, then of the new ones."""
    episodes: list[Episodes] = []

    def spy(*args: Any, **kwargs: Any) -> Episodes:
        episodes.append(draw(*args, **kwargs))
        return episodes[-1]

    monkeypatch.setattr(evaluation, "draw", spy)
    return episodes


def test_the_figures_are_means_and_standard_errors_over_episodes(session: Session, drawn: list[Episodes]) -> None:
    instruction, _ = instruct(session.study, "evaluate", scratch=True)
    figures = evaluate(session, session.theta, instruction)
    assert set(figures) == set(EVALUATION)
    assert [episodes.n_tasks for episodes in drawn] == [6, 6]
    for name, episodes in zip(("known", "new"), drawn, strict=True):
        moments = {
            "before": accuracies(session.engine, session.theta, episodes, 0),
            "after": accuracies(session.engine, session.theta, episodes, 3),
            "scratch": accuracies(session.scratch, session.scratch_theta, episodes, 1),
        }
        moments["gain"] = [a - b for a, b in zip(moments["after"], moments["scratch"], strict=True)]
        for moment, values in moments.items():
            assert figures[f"{name}.{moment}.mean"] == pytest.approx(np.mean(values), abs=1e-7)
            assert figures[f"{name}.{moment}.error"] == pytest.approx(np.std(values, ddof=1) / sqrt(6), abs=1e-7)
    # The gain's error is that of paired differences, not of two independent means.
    assert any(figures[f"{name}.gain.error"] > 0 for name in ("known", "new"))


def test_the_episodes_are_the_same_in_every_round_and_for_every_algorithm(
    session: Session, drawn: list[Episodes]
) -> None:
    instruction, _ = instruct(session.study, "evaluate")
    one = evaluate(session, session.theta, instruction)
    two = evaluate(session, session.theta, replace(instruction, round=9))
    assert one == two
    other = session.study.override({"algorithm.name": "protonet", "outer.rate": 0.5, "study.rounds": 7})
    rival = open_session(other.run_config(), {"partition-id": 1})
    evaluate(rival, rival.theta, instruct(other, "evaluate")[0])
    assert len(drawn) == 6
    for known, new in zip(drawn[::2], drawn[1::2], strict=True):
        assert torch.equal(known.query.x, drawn[0].query.x)
        assert torch.equal(new.support.x, drawn[1].support.x)


def test_only_patients_that_never_train_are_asked(session: Session, drawn: list[Episodes]) -> None:
    evaluate(session, session.theta, instruct(session.study, "evaluate")[0])
    site = session.site
    held_back = {pixels.tobytes() for pixels in site.pixels(np.flatnonzero(site.on_side(["test"])))}
    for episodes in drawn:
        for batch in (episodes.support, episodes.query):
            assert batch.mask is not None
            images = (batch.x[batch.mask] * 63.75 + 127.5).round().to(torch.uint8).numpy()
            assert {image.tobytes() for image in images} <= held_back


def test_from_scratch_costs_only_where_it_is_asked_for(session: Session) -> None:
    instruction, _ = instruct(session.study, "evaluate")
    broken = replace(session, scratch_theta={})
    figures = evaluate(broken, session.theta, instruction)
    missing = {name for name, value in figures.items() if value == -1}
    assert missing == {f"{p}.{m}.{f}" for p in ("known", "new") for m in ("scratch", "gain") for f in ("mean", "error")}


def test_what_a_site_does_not_have_is_minus_one(study: Study, sites: list[Site]) -> None:
    plan = study.override({"episodes.held-out": ""})
    session = replace(open_session(study.run_config(), {"partition-id": 1}), study=plan)
    instruction, _ = instruct(plan, "evaluate")
    figures = evaluate(session, session.theta, instruction)
    assert {name.split(".")[0] for name, value in figures.items() if value >= 0} == {"known"}

"""Evaluation at a site: the declared figures, recomputed episode by episode."""

from dataclasses import replace
from math import nan, sqrt
from typing import Any

import numpy as np
import pytest
import torch

from client import evaluation
from client.data.episodes import draw
from client.data.store import Site
from client.evaluation import evaluate
from client.session import Session, open_session
from common.contract import EVALUATION, Side, check_reply
from common.meta import Engine, Episodes, Scores
from common.meta.autodiff import EAGER
from common.study import Study
from tests.client.hospitals import ask, instruct, prepared, tiny_study
from tests.common.plain import plain_figures

SIDES: tuple[Side, ...] = ("validation", "test")


@pytest.fixture(scope="module")
def session(study: Study, sites: list[Site]) -> Session:
    changes: dict[str, bool | int | float | str] = {"episodes.test-episodes": 6, "algorithm.test-steps": 3}
    return open_session(study.override(changes).run_config(), {"partition-id": 1})


def accuracies(engine: Engine, theta: dict[str, torch.Tensor], episodes: Episodes, steps: int) -> list[float]:
    """Return the accuracy on every episode, each by itself."""
    return [
        float(engine.scores(theta, episodes.take(slice(t, t + 1)), steps).accuracy) for t in range(episodes.n_tasks)
    ]


def plain(engine: Engine, theta: dict[str, torch.Tensor], task: Episodes, steps: int) -> dict[str, float]:
    """Return the figures of one episode's query images, one by one, after adaptation without the engine."""
    state = engine.learner.adapt(engine.network, theta, task.support, task.classes, steps, EAGER)
    return plain_figures(engine.learner.predict(engine.network, state, task.query).softmax(1).detach(), task.query.y)


@pytest.fixture(scope="module")
def three_sides() -> Study:
    """A study whose hospitals have patients to train, to validate and to test."""
    study = tiny_study({"data.test-fraction": 0.4, "data.validation-fraction": 0.3})
    prepared(study)
    return study


def images(episodes: list[Episodes]) -> set[bytes]:
    """Return all images of some episodes, as the site stores them."""
    found = set()
    for batch in (batch for e in episodes for batch in (e.support, e.query)):
        assert batch.mask is not None
        found |= {i.tobytes() for i in (batch.x[batch.mask] * 63.75 + 127.5).round().to(torch.uint8).numpy()}
    return found


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
        each = [plain(session.engine, session.theta, episodes.task(t), 3) for t in range(6)]
        moments |= {figure: [values[figure] for values in each] for figure in ("balanced", "auroc", "ece")}
        for moment, values in moments.items():
            assert figures[f"{name}.{moment}.mean"] == pytest.approx(np.mean(values), abs=1e-6), moment
            assert figures[f"{name}.{moment}.error"] == pytest.approx(np.std(values, ddof=1) / sqrt(6), abs=1e-6)
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


@pytest.mark.parametrize("side", SIDES)
def test_a_training_site_is_judged_by_the_patients_of_one_side(
    three_sides: Study, drawn: list[Episodes], side: Side
) -> None:
    session = open_session(three_sides.run_config(), {"partition-id": 1})
    figures = evaluate(session, session.theta, instruct(three_sides, "evaluate", side=side)[0])
    assert min(figures["known.after.error"], figures["new.ece.error"]) >= 0
    site, pools = session.site, [session.evaluation_pool(side, new=new) for new in (False, True)]
    assert images(drawn) <= {pixels.tobytes() for pixels in site.pixels(np.flatnonzero(site.on_side([side])))}
    slots = np.sort(np.concatenate([of_class.slots for pool in pools for of_class in pool.images]))
    assert slots.tolist() == np.flatnonzero(site.on_side([side])).tolist()  # all of them, and none of another side


def test_the_two_sides_of_a_training_site_have_their_own_episodes(three_sides: Study, drawn: list[Episodes]) -> None:
    session = open_session(three_sides.run_config(), {"partition-id": 1})
    for side in (*SIDES, *SIDES):
        evaluate(session, session.theta, instruct(three_sides, "evaluate", side=side)[0])
    validation, test, *again = images(drawn[:2]), images(drawn[2:4]), images(drawn[4:6]), images(drawn[6:])
    assert again == [validation, test]
    assert validation
    assert test
    assert not validation & test


def test_a_held_out_site_is_judged_by_all_its_patients_whatever_the_side(
    three_sides: Study, drawn: list[Episodes]
) -> None:
    session = open_session(three_sides.run_config(), {"partition-id": 3})
    plan = three_sides.override({"episodes.test-episodes": 40})
    session = replace(session, study=plan)
    one, two = (evaluate(session, session.theta, instruct(plan, "evaluate", side=side)[0]) for side in SIDES)
    assert one == two
    site = session.site
    assert images(drawn[:2]) == images(drawn[2:])
    for side in ("train", *SIDES):
        assert images(drawn[:2]) & {pixels.tobytes() for pixels in site.pixels(np.flatnonzero(site.on_side([side])))}


def test_a_site_without_validation_patients_offers_nothing(study: Study, sites: list[Site]) -> None:
    instruction, theta = instruct(study, "evaluate", side="validation", scratch=True)
    reply = ask(study, 1, instruction, theta)
    figures = check_reply(reply.content, instruction, size=0, dtype="float32").scalars
    assert set(figures.values()) == {-1.0}


def test_an_episode_without_a_figure_is_left_out_of_its_mean(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = Scores(
        torch.tensor([0.5, 0.5, 0.5, 0.5]),
        torch.zeros(4),
        balanced=torch.tensor([nan, 0.2, nan, 0.6]),
        auroc=torch.tensor([nan, nan, 0.7, nan]),  # one value has no standard error
        ece=torch.full((4,), nan),
    )
    monkeypatch.setattr(Engine, "scores", lambda *_: fixed)
    figures = evaluate(session, session.theta, instruct(session.study, "evaluate")[0])
    assert figures["known.balanced.mean"] == pytest.approx(0.4)
    assert figures["known.balanced.error"] == pytest.approx(0.2)
    assert (figures["known.after.mean"], figures["known.after.error"]) == (0.5, 0)
    assert {figures[f"known.{figure}.{part}"] for figure in ("auroc", "ece") for part in ("mean", "error")} == {-1.0}


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

"""The frontier: which runs it makes, what it reads off them, and that it goes on where it was stopped."""

import json
from dataclasses import replace
from math import inf, isnan, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from client.data.episodes import draw
from client.evaluation import meta_test_generator
from client.session import open_session
from common.errors import StudyError
from common.models.released import keep
from common.privacy.accounting import epsilon
from common.privacy.site_task import sums_of
from common.privacy.statement import rounds_of
from server.rounds import initial_theta
from simulations.cli import app
from simulations.experiments import frontier
from simulations.experiments.frontier import Choice, Plan, Run, Setting, line, measure, plans, read
from simulations.experiments.frontier_score import utility
from simulations.experiments.frontier_table import rows, tree
from simulations.prepare import prepare

TINY = frontier.built_in().override(
    {
        "study.rounds": 3,
        "sites.held-out": "hospital-2",
        "model.width": 4,
        "model.image-size": 16,
        "data.sites": 3,
        "data.patients-per-class": 20,
        "episodes.test-episodes": 3,
        "episodes.shots": 2,
        "episodes.queries": 3,
        "episodes.per-round": 2,
    }
)
SETTING = Setting(sampling=0.5, clip=1.0, delta=1e-5, attacked=3)


@pytest.fixture(scope="module", autouse=True)
def sites() -> None:
    prepare(TINY)


def test_every_combination_is_run_with_the_noise_that_its_epsilon_needs() -> None:
    private = TINY.override(
        {
            "privacy.mechanism": "episode-clip",
            "privacy.clip": 9.0,
            "privacy.noise": 9.0,
            "privacy.sampling": 0.9,
            "privacy.delta": 0.1,
            "privacy.figures": "withheld",
        }
    )
    todo = plans(private, SETTING, Choice(epsilons=(2.0, inf), seeds=2))
    assert todo == plans(TINY, SETTING, Choice(epsilons=(2.0, inf), seeds=2))
    names = [(p.part, p.learner, p.mechanism, p.study.study.seed) for p in todo]
    assert len(set(names)) == len(names) == 2 * 2 * 2 * 3
    assert len({p.study.digest for p in todo}) == len(todo)
    for plan in todo:
        study = plan.study
        assert study.algorithm.name == plan.learner
        assert study.model.name == {"full": "conv4", "head": "head:conv4"}[plan.part]
        assert (plan.epsilon == inf) == (study.privacy.mechanism == "none")
        assert plan.judged.episodes == todo[-1].judged.episodes
        if plan.epsilon < inf:
            assert study.privacy.guaranteed
            assert 1.98 < epsilon([rounds_of(study)], 1e-5) <= 2
    by_patient = next(p.study for p in todo if p.mechanism == "patient-clip")
    sums = sums_of(by_patient)
    session = open_session(TINY.run_config(), {"partition-id": 0})
    people = 0.5 * len(np.unique(session.site.patients[session.site.on_side(("train",))]))
    assert sums.support_patients + sums.query_patients == pytest.approx(people, abs=3)


@pytest.mark.parametrize(
    ("changes", "choice", "message"),
    [
        ({}, {"mechanisms": ("prayer",)}, "no prayer here: choose among episode-clip"),
        ({}, {"parts": ("tail",)}, "no tail here: choose among full, head"),
        ({"episodes.labels": "shuffled"}, {}, r"needs episodes\.labels = 'fixed'"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], choice: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        plans(TINY.override(changes), SETTING, Choice(**choice))


def test_utility_is_what_the_site_itself_would_say() -> None:
    study = TINY.override({"algorithm.test-steps": 2})
    session = open_session(study.run_config(), {"partition-id": 1})
    theta = initial_theta(study)
    found = utility(session, study, theta)
    pool = session.evaluation_pool("test", new=False)
    episodes = draw(session.site, pool, study.episodes, 3, meta_test_generator(session, "known"))
    assert episodes.query.mask is not None
    assert episodes.query.mask.all()  # or a mean over episodes would be another one than over images
    own = session.engine.scores(theta, episodes, 2)
    assert found is not None
    assert found["accuracy"] == pytest.approx(float(own.accuracy.mean()))
    assert found["balanced"] == pytest.approx(fmean(found["recall"].values()))
    assert list(found["recall"]) == ["disc", "ring", "cross"]


def test_runs_are_made_once_and_their_figures_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real apps, both mechanisms, and a file that is gone on with; nobody's ledger is spent."""
    todo = plans(TINY, SETTING, Choice(learners=("fomaml",), parts=("head",), epsilons=(2.0, inf, 0.0), seeds=1))
    file = tmp_path / "runs.jsonl"
    for _, run in measure(todo[:2], 3):
        with file.open("a") as lines:
            lines.write(line(run))
    real, made = frontier._run, list[Plan]()

    def run_and_note(plan: Plan, attacked: int) -> Run:
        made.append(plan)
        return real(plan, attacked)

    monkeypatch.setattr(frontier, "_run", run_and_note)
    done = list(measure(todo, 3, read(file)))
    assert made == todo[2:]
    assert [run for _, run in done[:2]] == read(file)
    assert [plan for plan, _ in done] == todo
    assert next(measure(todo[:1], 2, read(file)))[1].attacked == 2  # what was attacked otherwise is another run
    for plan, run in done:
        assert set(run.sites) == {"hospital-0", "hospital-1", "hospital-2"}
        assert run.numbers == 3 * 4 + 3
        assert (run.bounds is None) == (plan.mechanism in {"none", "no round"})
        assert run.spent is None or run.spent <= 2
        assert all(0 <= figure["auc"] <= 1 and not figure["broken"] for figure in run.attack.values())
        assert bool(run.attack) == (plan.epsilon > 0)
    judged = todo[-1].judged
    start = utility(open_session(judged.run_config(), {"partition-id": 1}), judged, initial_theta(judged))
    assert done[-1][1].sites["hospital-1"] == start
    assert not list(open_session(TINY.run_config(), {"partition-id": 0}).site.folder.glob("ledger*"))


def _run(mechanism: str, cost: float | None, seed: int, values: dict[str, float], auc: float = 0.5) -> tuple[Plan, Run]:
    study = TINY.override({"study.seed": seed})
    sites = {n: {"accuracy": v, "balanced": v, "recall": {"disc": v, "ring": v / 2}} for n, v in values.items()}
    attack = {"query": {"auc": auc, "low": 0.1, "high": 0.9, "broken": False}}
    run = Run("d", mechanism, "maml", "full", cost, seed, 1.0, cost, 9, 0.1, 3, 5, sites, attack, [0.7, 0.8], 1.0)
    return Plan(mechanism, "maml", "full", inf if cost is None else cost, study, study), run


def test_a_row_is_the_mean_over_seeds_at_the_held_out_site() -> None:
    free = [_run("none", None, s, {"hospital-0": 0.9, "hospital-2": v}) for s, v in ((0, 0.8), (1, 0.7))]
    private = [
        _run("patient-clip", 3.0, s, {"hospital-0": 0.4, "hospital-2": v}, auc)
        for s, v, auc in ((0, 0.7, 0.5), (1, 0.5, 0.6))
    ]
    first, second = rows([*private, *free])
    assert (first.mechanism, first.epsilon, first.cost) == ("none", inf, None)
    assert second.balanced.mean == pytest.approx(0.6)
    assert second.balanced.half == pytest.approx(12.706 * stdev([0.7, 0.5]) / sqrt(2), rel=1e-3)
    assert second.cost is not None
    assert second.cost.mean == pytest.approx(fmean([0.1, 0.2]))  # seed by seed
    assert second.cost.half == pytest.approx(12.706 * stdev([0.1, 0.2]) / sqrt(2), rel=1e-3)
    assert second.worst[0] == "hospital-0"
    assert second.worst[1] == pytest.approx(0.4)
    assert second.recall["ring"].mean == pytest.approx(0.3)
    assert "cross" not in second.recall
    assert second.auc is not None
    assert second.auc[1] == pytest.approx(0.55)
    (alone,) = rows(private[:1])
    assert alone.cost is None
    assert isnan(alone.balanced.half)
    (leaf,) = tree([alone])
    assert leaf["balanced"] == {"mean": 0.7, "half": None}
    assert json.loads(json.dumps(leaf)) == leaf


def test_the_command_prints_a_table_and_draws(tmp_path: Path) -> None:
    """From a released body; the second time nothing is run."""
    start = tmp_path / "theta.safetensors"
    save_file(initial_theta(TINY.override({"study.seed": 77})), start)
    study = tmp_path / "tiny.toml"
    study.write_text(TINY.toml())
    asked = [
        "privacy", "--study", str(study), "--epsilon", "2,inf", "--seeds", "1", "--learners", "fomaml",
        "--parts", "head", "--mechanisms", "patient-clip", "--attacked", "2",
        "--start", str(start),
        "--runs", str(tmp_path / "runs.jsonl"), "--picture", str(tmp_path / "frontier.png"),
    ]  # fmt: skip
    first, again = (CliRunner().invoke(app, [*asked, *more]) for more in ([], ["--json"]))
    assert first.exit_code == 0, first.output
    assert "signal to noise" in first.stderr
    assert "patient-clip" in first.stdout
    assert "recall by class" in first.stdout
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert len(read(tmp_path / "runs.jsonl")) == 2
    free, private = json.loads(again.stdout)
    assert (free["epsilon"], private["epsilon"], private["numbers"]) == (None, 2.0, 15)
    digest = keep(start)
    todo = plans(TINY, replace(SETTING, starts=(digest, "b" * 64)), Choice(seeds=3))
    begun = {plan.study.study.seed: json.loads(plan.study.model.arguments)["start"] for plan in todo}
    assert begun == {0: digest, 1: "b" * 64, 2: digest}
    # Runs that were made with `-c study.seed=1` are the same.
    rest = plans(TINY.override({"study.seed": 1}), replace(SETTING, starts=(digest, "b" * 64)), Choice(seeds=2))
    assert {plan.study.digest for plan in rest} <= {plan.study.digest for plan in todo}
    wrong = CliRunner().invoke(app, ["privacy", "--study", str(study), "--epsilon", "1,none"])
    assert wrong.exit_code == 2
    assert "it was 'none'" in wrong.output

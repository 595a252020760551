"""Resuming: the same bits as without an interruption, and a refusal where the study is another one."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from common.errors import NotPreparedError, RoundError, StorageError, StudyError
from common.study import Outer, Study
from server.outer import OuterOptimiser
from server.record import RunRecord, run_folder
from server.resume import resume_on_flower
from server.runs import recorded_study
from simulations.engines.inprocess import run_in_process
from tests.server.scripted import Scripted, a_study
from tests.server.test_rounds import RUNS, no_pause

__all__ = ["no_pause"]


class PowerCut(BaseException):
    """Ends a run at once, as nothing that it catches would."""


def cut(study: Study, run_id: int, at: int, kind: str = "train", *, resume: bool = False) -> None:
    """Run until a site is asked something in a round, and no further."""

    def fault(site: int, message: Message) -> str | None:
        instruction = message.content.config_records["instruction"]
        if (instruction["kind"], instruction["round"], site) == (kind, at, 2):
            raise PowerCut
        return None

    with pytest.raises(PowerCut):
        run_in_process(study, client=Scripted(study), fault=fault, run_id=run_id, resume=run_id if resume else None)


def resumed(study: Study, run_id: int) -> Path:
    run_in_process(study, client=Scripted(study), resume=run_id)
    return run_folder(run_id)


def outcome(folder: Path) -> tuple[bytes, bytes, list[Any], list[Any]]:
    """Return all that a run comes to, without the times."""

    def lines(name: str) -> list[Any]:
        timed = {"at", "seconds", "seconds_left", "transport_seconds", "waiting_seconds", "compute_seconds"}
        read = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in timed} for line in read]

    theta, result = ((folder / name).read_bytes() for name in ("theta.safetensors", "result.json"))
    return theta, result, lines("history.jsonl"), lines("evaluations.jsonl")


VARIETY: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd with momentum, cosine": {"outer.optimiser": "sgd", "outer.momentum": 0.9, "outer.schedule": "cosine"},
    "average, clipping": {"outer.average": 0.5, "outer.clip": 0.7, "outer.optimiser": "adamw"},
    "best": {"outer.patience": 9, "episodes.test-every": 2},
    "a rule with a memory": {
        "aggregation.rule": "centred-clipping",
        "aggregation.tolerated": 1,
        "aggregation.radius": 1.0,
        "aggregation.momentum": 0.8,
    },
    "sampling": {"sites.per-round": 2, "sites.quorum": 1},
}


@pytest.mark.parametrize("changes", VARIETY.values(), ids=VARIETY)
def test_a_resumed_run_has_the_same_bits(changes: dict[str, Any]) -> None:
    study = a_study({"study.rounds": 7, **changes})
    whole, _ = run_in_process(study, client=Scripted(study), run_id=next(RUNS))
    number = next(RUNS)
    asked = [r for r in range(1, 8) if "hospital-2" in _asked(run_folder(whole), r)]
    cut(study, number, asked[1])
    cut(study, number, asked[-1], resume=True)
    cut(study, number, 7, "evaluate", resume=True)
    assert outcome(resumed(study, number)) == outcome(run_folder(whole))


def _asked(folder: Path, number: int) -> set[str]:
    line = json.loads((folder / "history.jsonl").read_text().splitlines()[number - 1])
    return set(line["sites"])


def test_the_record_says_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    study = a_study({"study.rounds": 4})
    number = next(RUNS)
    cut(study, number, 3)
    folder = run_folder(number)
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    assert not (folder / "result.json").exists()
    resumed(study, number)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["round"] for e in events if e["event"] == "resumed"] == [2]
    assert sum(e["event"] == "joined" for e in events) == 8
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["round"]) == ("finished", 4)
    assert "resumed after round 2" in capsys.readouterr().out
    assert recorded_study(folder) == study


def test_a_failed_run_can_be_resumed_when_the_sites_are_back() -> None:
    study = a_study({"study.rounds": 3, "sites.deadline-seconds": 0.2})
    whole, _ = run_in_process(study, client=Scripted(study), run_id=next(RUNS))
    number = next(RUNS)

    def fault(site: int, message: Message) -> str | None:
        return "drop" if message.metadata.message_type == "train" and site in {0, 1} else None

    with pytest.raises(RoundError, match="what was learned is kept: when the sites are back, resume the run"):
        run_in_process(study, client=Scripted(study), fault=fault, run_id=number)
    assert (run_folder(number) / "failure.txt").exists()
    folder = resumed(study, number)
    assert not (folder / "failure.txt").exists()
    assert outcome(folder)[:1] == outcome(run_folder(whole))[:1]


def test_a_changed_study_does_not_resume_and_the_fields_are_named() -> None:
    study = a_study({"study.rounds": 4})
    number = next(RUNS)
    cut(study, number, 3)
    other = study.override({"study.rounds": 5, "outer.rate": 0.5})
    with pytest.raises(StudyError) as error:
        resumed(other, number)
    assert "outer.rate was 0.007, is 0.5" in str(error.value)
    assert "study.rounds was 4, is 5" in str(error.value)
    assert "study.seed" not in str(error.value)


def test_there_must_be_something_to_resume_and_no_run_is_written_over() -> None:
    study = a_study()
    with pytest.raises(NotPreparedError, match="no run to resume"):
        resumed(study, next(RUNS))
    number, _ = run_in_process(study, client=Scripted(study), run_id=next(RUNS))
    with pytest.raises(RoundError, match="holds a run already: resume it"):
        run_in_process(study, client=Scripted(study), run_id=number)


def test_a_damaged_checkpoint_costs_a_round_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    study = a_study({"study.rounds": 6})
    whole, _ = run_in_process(study, client=Scripted(study), run_id=next(RUNS))
    number = next(RUNS)
    cut(study, number, 5)
    state = run_folder(number) / "checkpoints" / "000004" / "state.json"
    state.write_bytes(state.read_bytes()[:-9])
    folder = resumed(study, number)
    assert outcome(folder) == outcome(run_folder(whole))
    assert "warning: the checkpoint of round 4 is damaged" in capsys.readouterr().out
    assert '"event":"damaged"' in (folder / "events.jsonl").read_text()


def test_a_log_that_lost_lines_is_not_gone_on_with() -> None:
    study = a_study({"study.rounds": 6})
    number = next(RUNS)
    cut(study, number, 5)
    (run_folder(number) / "history.jsonl").write_text("")
    with pytest.raises(StorageError, match="shorter than at the checkpoint"):
        resumed(study, number)


def test_half_a_line_of_an_event_goes(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run", a_study())
    record.event("joined", site="a")
    with (record.folder / "events.jsonl").open("ab") as log:
        log.write(b'{"event":"jo')
    RunRecord(tmp_path / "run", a_study(), resume=True).event("joined", site="b")
    lines = (record.folder / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["site"] for line in lines] == ["a", "b"]


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_an_optimiser_goes_on_from_its_state(optimiser: Any, schedule: Any) -> None:
    outer = Outer(optimiser=optimiser, schedule=schedule, momentum=0.9 * (optimiser == "sgd"), average=0.5, clip=2.0)
    start = np.random.default_rng(0).normal(size=7).astype(np.float32)
    gradients = np.random.default_rng(1).normal(size=(6, 7))
    whole, first = (OuterOptimiser(outer, start, 6) for _ in range(2))
    for gradient in gradients:
        whole.step(gradient)
    for gradient in gradients[:3]:
        first.step(gradient)
    tensors, about = first.state()
    second = OuterOptimiser(outer, start, 6)
    second.restore(tensors, json.loads(json.dumps(about)))
    for gradient in gradients[3:]:
        first.step(gradient)  # what was given away is its own
        second.step(gradient)
    assert second.theta.tobytes() == whole.theta.tobytes()
    assert second.published.tobytes() == whole.published.tobytes()
    assert not np.array_equal(second.theta, second.published)


STUB = """#!{python}
import json, pathlib, sys, tomllib
arguments = sys.argv[1:]
plan = tomllib.loads(pathlib.Path(arguments[arguments.index("--run-config") + 1]).read_text())
pathlib.Path("{seen}").write_text(json.dumps([arguments, plan]))
pathlib.Path("{folder}/status.json").write_text(json.dumps({{"state": "{state}"}}))
"""


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_the_command_hands_flower_the_runs_own_study_and_tells_how_it_ended(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = a_study({"study.rounds": 4})
    number = next(RUNS)
    cut(study, number, 3)
    folder, seen, flwr = run_folder(number), tmp_path / "seen.json", tmp_path / "flwr"
    flwr.write_text(STUB.format(python=sys.executable, seen=seen, folder=folder, state=state))
    flwr.chmod(0o700)
    monkeypatch.setattr("server.resume.tool", lambda _: str(flwr))
    if state == "finished":  # Flower's own exit code is 0 in both cases
        resume_on_flower(folder, app=tmp_path, superlink="consortium", federation="num-supernodes=4")
    else:
        with pytest.raises(RoundError, match="did not end with a result"):
            resume_on_flower(folder, app=tmp_path, superlink="consortium", federation="num-supernodes=4")
    arguments, plan = json.loads(seen.read_text())
    assert arguments[:4] == ["run", str(tmp_path), "consortium", "--stream"]
    assert arguments[-2:] == ["--federation-config", "num-supernodes=4"]
    assert plan.pop("resume") == str(number)
    assert Study.from_run_config(plan) == study


def test_a_finished_run_and_one_that_lies_elsewhere_are_not_resumed(tmp_path: Path) -> None:
    study = a_study()
    number, _ = run_in_process(study, client=Scripted(study), run_id=next(RUNS))
    with pytest.raises(RoundError, match="has its result already"):
        resume_on_flower(run_folder(number), app=tmp_path, superlink="local", federation=None)
    shutil.copytree(run_folder(number), tmp_path / "elsewhere")
    with pytest.raises(StudyError, match="where runs are resumed"):
        resume_on_flower(tmp_path / "elsewhere", app=tmp_path, superlink="local", federation=None)

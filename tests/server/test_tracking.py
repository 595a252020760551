"""Trackers get what the run records, and can neither stop a run nor hold it up."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from common.errors import StudyError
from common.study import Study
from server import tracking
from server.runs import lines, recorded_study
from server.tracking import open_trackers
from server.tracking.tracker import round_figures, site_figures
from simulations.engines.control import until
from tests.ports import free_port
from tests.server.runs import write_run

STUDY = Study()


def threads() -> set[threading.Thread]:
    """Return the trackers' threads; one that another test has left may still wait for its server."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("track-")}


class Fake:
    """Writes down what it gets; does something on a round."""

    def __init__(self, on_round: Any = None) -> None:
        self.got: list[tuple[str, Any]] = []
        self._on_round = on_round

    def round(self, line: Mapping[str, Any]) -> None:
        self.got.append(("round", line))
        if self._on_round:
            self._on_round(line)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        self.got.append(("evaluation", line))

    def finish(self, result: Mapping[str, Any]) -> None:
        self.got.append(("finish", result))

    def close(self) -> None:
        self.got.append(("close", None))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    made = {"tensorboard": Fake(), "mlflow": Fake()}
    monkeypatch.setattr(tracking, "_OPEN", {kind: lambda *_, kind=kind: made[kind] for kind in made})
    return made


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("wandb", "wandb is no tracker; known are tensorboard, mlflow=URI"),
        ("tensorboard,tensorboard", "named twice"),
        ("tensorboard=here", "says too much"),
        ("mlflow", "not complete"),
        ("mlflow=", "not complete"),
        ("prometheus", "not complete"),
        ("prometheus=0", "no port"),
        ("prometheus=65536", "no port"),
        ("prometheus=http", "no port"),
        ("prometheus=٣", "no port"),
        ("=x", "is no tracker"),
    ],
)
def test_what_is_no_tracker_is_refused_in_a_sentence(spec: str, words: str, tmp_path: Path) -> None:
    before = threads()
    with pytest.raises(StudyError, match=words):
        open_trackers(spec, tmp_path, STUDY)
    assert threads() <= before


def test_a_port_that_is_taken_is_refused_and_what_was_open_is_closed(tmp_path: Path) -> None:
    before = threads()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StudyError, match="choose another port"):
            open_trackers(f"tensorboard,prometheus={taken.getsockname()[1]}", tmp_path, STUDY)
    assert threads() <= before


@pytest.mark.parametrize(
    ("spec", "module"),
    [("tensorboard", "tensorboard"), ("mlflow=/x", "mlflow"), ("prometheus=9464", "prometheus_client")],
)
def test_a_missing_extra_says_what_to_install(
    spec: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module or "utils.tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StudyError, match=r"pip install 'wardround\[tracking\]'"):
        open_trackers(spec, tmp_path, STUDY)


def test_none_asked_for_is_none(tmp_path: Path) -> None:
    trackers = open_trackers("", tmp_path, STUDY)
    trackers.round({"round": 1, "sites": {}})
    trackers.finish({})
    trackers.close()
    assert not [*tmp_path.iterdir()]


def test_all_get_every_line_in_order(fakes: dict[str, Fake], tmp_path: Path) -> None:
    trackers = open_trackers("tensorboard, mlflow=x", tmp_path, STUDY)
    for number in range(1, 6):
        trackers.round({"round": number})
    trackers.evaluation({"round": 5})
    trackers.finish({"rounds": 5})
    trackers.close()
    wanted = [*(("round", {"round": n}) for n in range(1, 6)), ("evaluation", {"round": 5}), ("finish", {"rounds": 5})]
    for fake in fakes.values():
        assert fake.got == [*wanted, ("close", None)]


def test_one_that_fails_is_named_once_and_switched_off(fakes: dict[str, Fake], tmp_path: Path) -> None:
    def fail(line: Mapping[str, Any]) -> None:
        raise RuntimeError("no\nsuch server")

    fakes["mlflow"]._on_round = fail
    said: list[str] = []
    trackers = open_trackers("tensorboard,mlflow=x", tmp_path, STUDY, said.append)
    for number in range(1, 4):
        trackers.round({"round": number})
        time.sleep(0.01)
    trackers.finish({})
    trackers.close()
    assert said == ["tracking with mlflow is switched off, the run goes on: RuntimeError: no such server"]
    assert [kind for kind, _ in fakes["mlflow"].got] == ["round", "close"]
    assert [kind for kind, _ in fakes["tensorboard"].got] == ["round"] * 3 + ["finish", "close"]


def test_a_slow_one_holds_up_neither_rounds_nor_the_end(
    fakes: dict[str, Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_WAITING", 5)
    monkeypatch.setattr(tracking, "_PATIENCE", 1.0)
    release = threading.Event()
    fakes["mlflow"]._on_round = lambda line: release.wait(60)
    said: list[str] = []
    trackers = open_trackers("tensorboard,mlflow=x", tmp_path, STUDY, said.append)
    began = time.monotonic()
    for number in range(50):
        trackers.round({"round": number})
        until(lambda: len(fakes["tensorboard"].got) > number, 60, lambda: "it takes no lines")  # noqa: B023
    trackers.close()
    assert time.monotonic() - began < 60
    release.set()
    assert said == ["tracking with mlflow is switched off, the run goes on: it is 5 lines behind"]
    assert len(fakes["tensorboard"].got) == 51


def test_figures_that_were_not_sent_are_no_figures() -> None:
    line = {"round": 1, "sites": {"a": {"loss": -1.0, "accuracy": -1.0}, "b": {"loss": 0.5, "accuracy": 0.75}}}
    assert [*site_figures(line)] == [("b", "loss", 0.5), ("b", "accuracy", 0.75)]
    assert round_figures(line)["accuracy"] == 0.75
    evaluation = {"round": 1, "sites": {"a": {"known.gain.mean": -0.2}}}
    assert [*site_figures(evaluation)] == [("a", "known.gain.mean", -0.2)]  # a loss of accuracy is one


def fed(folder: Path, spec: str, said: list[str] | None = None) -> None:
    """Give a written run, line by line, to trackers of it."""
    said = [] if said is None else said
    trackers = open_trackers(spec, folder, recorded_study(folder), said.append)
    for line in [*lines(folder / "history.jsonl")]:
        trackers.round(line)
    for line in [*lines(folder / "evaluations.jsonl")]:
        trackers.evaluation(line)
    trackers.finish({"theta": "abc"})
    trackers.close()


def faults(number: int, site: str) -> str | None:
    return "not-finite" if (number, site) == (2, "hospital-1") else None


def tensorboard_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_holds_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=4, faults=faults, episodes__test_every=2)
    said: list[str] = []
    fed(folder, "tensorboard", said)
    assert said == []
    events = tensorboard_of(folder)
    history = [*lines(folder / "history.jsonl")]
    loss = events.Scalars("loss/hospital-1")
    assert [e.step for e in loss] == [1, 3, 4]
    assert [e.value for e in loss] == pytest.approx([history[n - 1]["sites"]["hospital-1"]["loss"] for n in (1, 3, 4)])
    assert [e.value for e in events.Scalars("round/sites_out")] == [0, 1, 0, 0]
    assert len(events.Scalars("test.known.gain/hospital-3")) == 1


def test_tensorboard_forgets_rounds_that_a_resumed_run_does_again(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=4)
    fed(folder, "tensorboard")
    history = (folder / "history.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "history.jsonl").write_bytes(b"".join(history[:2]))  # the checkpoint was older
    time.sleep(1.1)  # TensorBoard orders files by the second
    trackers = open_trackers("tensorboard", folder, recorded_study(folder))
    trackers.round({"round": 3, "sites": {"hospital-0": {"loss": 9.0, "accuracy": 0.5}}})
    trackers.close()
    events = tensorboard_of(folder)
    assert [(e.step, e.value == 9.0) for e in events.Scalars("loss/hospital-0")] == [(1, False), (2, False), (3, True)]


def test_mlflow_holds_the_run_and_a_resumed_one_goes_on_in_it(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    sites = ["Haus Süd: 3/β", "hospital-1", "hospital-2", "hospital-3"]
    folder = write_run(tmp_path / "7", rounds=4, sites=sites, faults=faults, episodes__test_every=2)
    store = tmp_path / "mlflow"
    said: list[str] = []
    fed(folder, f"mlflow={store}", said)
    assert said == []
    client = MlflowClient(tracking_uri=store.as_uri())
    (experiment,) = (e for e in client.search_experiments() if e.name == "wardround")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["algorithm.name"] == "protomaml"
    assert run.data.tags["wardround.theta"] == "abc"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss/hospital-1")] == [1, 3, 4]
    assert "loss/Haus S_d: 3__" in run.data.metrics
    assert "test.known.after.mean/hospital-3" in run.data.metrics

    trackers = open_trackers(f"mlflow={store}", folder, recorded_study(folder))
    trackers.round({"round": 5, "at": 1.0, "sites": {"hospital-1": {"loss": 0.25, "accuracy": 0.5}}})
    trackers.close()  # without a result
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["loss/hospital-1"] == 0.25
    assert run.info.status == "KILLED"


@contextmanager
def deaf_server() -> Iterator[int]:
    """Listen, and never answer."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield int(server.getsockname()[1])


def test_an_mlflow_server_that_is_not_there_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = write_run(tmp_path / "7", rounds=2)
    said: list[str] = []
    began = time.monotonic()
    fed(folder, f"mlflow=http://127.0.0.1:{free_port()}", said)
    assert time.monotonic() - began < 60
    assert len(said) == 1
    assert said[0].startswith("tracking with mlflow is switched off, the run goes on: ")


def test_an_mlflow_server_that_never_answers_holds_up_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_PATIENCE", 0.2)
    folder = write_run(tmp_path / "7", rounds=2)
    import mlflow  # noqa: F401  # its import takes a second or two

    said: list[str] = []
    with deaf_server() as port:
        began = time.monotonic()
        fed(folder, f"mlflow=http://127.0.0.1:{port}", said)
        assert time.monotonic() - began < 30
    assert said == ["tracking with mlflow is switched off, the run goes on: it did not take everything within 0.2 s"]


def test_prometheus_shows_the_last_round_and_counts_since_the_start(tmp_path: Path) -> None:
    sites = ['a"b\\c', "hospital-1", "hospital-2", "hospital-3"]
    folder = write_run(tmp_path / "7", rounds=4, sites=sites, faults=faults, episodes__test_every=2)
    history = [*lines(folder / "history.jsonl")]
    port, said = free_port(), list[str]()
    trackers = open_trackers(f"prometheus={port}", folder, recorded_study(folder), said.append)

    def scrape() -> dict[str, float]:
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def after(round_number: int) -> dict[str, float]:
        until = time.monotonic() + 60
        while scrape().get("wardround_round") != round_number and time.monotonic() < until:
            time.sleep(0.01)
        return scrape()

    try:
        trackers.round(history[0])
        assert 'wardround_loss{site="hospital-1"}' in after(1)
        trackers.round(history[1])
        found = after(2)
        assert 'wardround_loss{site="hospital-1"}' not in found  # it was out
        assert found['wardround_loss{site="a\\"b\\\\c"}'] == pytest.approx(history[1]["sites"][sites[0]]["loss"])
        assert found['wardround_rejections_total{site="hospital-1",why="not-finite"}'] == 1
        assert found['wardround_sites{state="out"}'] == 1
        assert found['wardround_bytes_total{direction="up"}'] == sum(line["bytes_up"] for line in history[:2])
        assert found["wardround_last_round_timestamp_seconds"] == pytest.approx(history[1]["at"])
        assert found["wardround_rounds"] == 4
        assert found["wardround_finished"] == 0
        trackers.evaluation([*lines(folder / "evaluations.jsonl")][-1])
        trackers.round(history[2])
        found = after(3)
        assert 'wardround_evaluation{figure="known.after.mean",side="test",site="hospital-3"}' in found
        # Nobody outside of this machine can ask.
        with socket.socket() as elsewhere:
            elsewhere.bind(("127.0.0.2", port))
    finally:
        trackers.close()
    assert said == []
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))  # closed


_WATCHED = """
import sys
seen = []
def watch(event, arguments):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}:
        where = arguments[-1][0] if event == "socket.connect" else arguments[0]
        if where != "127.0.0.1":
            seen.append((event, where))
sys.addaudithook(watch)
from pathlib import Path
from server.runs import lines, recorded_study
from server.tracking import open_trackers
folder = Path(sys.argv[1])
trackers = open_trackers(sys.argv[2], folder, recorded_study(folder))
for line in lines(folder / "history.jsonl"):
    trackers.round(line)
trackers.finish({})
trackers.close()
import time
time.sleep(3)
print(seen)
"""


@pytest.mark.slow
def test_nothing_is_sent_home(tmp_path: Path) -> None:
    """In a process that MLflow takes for a real one: it keeps quiet in tests and in CI by itself."""
    folder = write_run(tmp_path / "7", rounds=2)
    hidden = {"CI", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "PYTEST_CURRENT_TEST", "BUILDKITE"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    spec = f"tensorboard,mlflow={tmp_path / 'mlflow'},prometheus={free_port()}"
    command = [sys.executable, "-c", _WATCHED, str(folder), spec]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "mlflow").is_dir()

"""Messages that the ClientApp hands over to a worker, and what becomes of them when the worker does not answer."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from client.answers import answer
from client.app import app
from client.data.store import Site
from client.gateway.approvals import decide, note_study
from client.worker.call import hand_over
from client.worker.serve import serve, serving
from client.worker.wire import pack_answer, pack_question, unpack_answer, unpack_question
from common.contract import Kind, pack_instruction
from common.errors import ApprovalError, ContractError, NotPreparedError, WardroundError
from common.study import Study
from simulations.engines.inprocess import transmit
from tests.client.hospitals import instruct, objects, prepared, tiny_study, wire_bytes

KINDS: list[Kind] = ["join", "train", "evaluate"]
TYPES = {"join": "query.join", "train": "train", "evaluate": "evaluate"}
SECRET = "Kowalska^Zofia"


@pytest.fixture
def socket() -> Iterator[Path]:
    """A path that is short enough for a socket."""
    with TemporaryDirectory(prefix="worker-") as name:
        yield Path(name) / "worker" / "socket"


def first_site(kind: Kind, content: RecordDict, run_config: dict[str, object]) -> RecordDict | Error:
    return answer(kind, content, run_config, {"partition-id": 0})


@contextmanager
def working(socket: Path, answer: Callable[..., Any] = first_site, hung: Callable[[], object] = list) -> Iterator[None]:
    with serving(socket, answer, hung):
        yield


def asked(study: Study, kind: Kind, node: dict[str, Any], *, ttl: float = 60.0) -> Message:
    """Return what the ClientApp of a node answers."""
    message = Message(pack_instruction(*instruct(study, kind)), 7, TYPES[kind], ttl=ttl)
    message.metadata.__dict__["_message_id"] = "1"
    return app(transmit(message)[0], Context(1, 7, node, RecordDict(), dict(study.run_config())))


def incident(reply: Message) -> str:
    """Return the incident number of a reply that holds the code of the unexpected and that number alone."""
    assert reply.error.code == WardroundError.code
    match = re.fullmatch(r"incident ([0-9a-f]{8})", reply.error.reason or "")
    assert match
    return match[1]


def test_the_clientapp_s_process_needs_no_pytorch() -> None:
    script = (
        "import sys, client.app, client.worker.call; "
        "assert not {'torch', 'scipy', 'pydicom', 'pydantic_settings'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("figures", ["sent", "withheld"])
def test_a_worker_s_answers_are_those_of_the_clientapp_alone(figures: str, socket: Path) -> None:
    study = tiny_study({"privacy.figures": figures})
    prepared(study)
    with working(socket):
        for kind in KINDS:
            alone, through = (asked(study, kind, node) for node in ({"partition-id": 0}, {"worker": str(socket)}))
            if alone.has_error():  # with another incident
                assert (through.error.code, figures, kind) == (alone.error.code, "withheld", "evaluate")
                continue
            ours, theirs = objects(through), objects(alone)
            assert {**ours, "Message": 0} == {**theirs, "Message": 0}  # the messages have their times


def test_a_worker_s_errors_are_those_of_the_clientapp_alone(socket: Path) -> None:
    study = tiny_study({"data.seed": 404})  # nobody prepared it
    with working(socket):
        reply = asked(study, "train", {"worker": str(socket)})
    assert reply.error.code == NotPreparedError.code
    assert re.fullmatch(r"incident [0-9a-f]{8}", reply.error.reason or "")


def test_without_a_worker_a_code_leaves_and_the_next_message_is_answered_when_there_is_one(
    study: Study, sites: list[Site], socket: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"worker": str(socket)}

    def incident_at_once() -> str:
        with monkeypatch.context() as patch:
            patch.setattr("client.worker.call._PATIENCE_SECONDS", 0.05)
            return incident(asked(study, "join", node))

    assert f"incident {incident_at_once()}: there is no worker at {socket}" in capfd.readouterr().err
    for _ in range(2):  # it is started, ends, is started again
        with working(socket):
            assert asked(study, "join", node).has_content()
        incident_at_once()


def test_a_worker_looks_up_what_the_site_has_approved(
    study: Study, sites: list[Site], socket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Callable[..., Any]] = []

    def listen(_socket: Path, answer: Callable[..., Any], hung: object) -> None:
        answers.append(answer)
        raise InterruptedError  # instead of serving

    monkeypatch.setattr("client.worker.serve.serving", listen)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def asked_of(approvals: Path | None) -> RecordDict | Error:
        with pytest.raises(InterruptedError):
            serve(sites[0].folder, socket, approvals)
        found: RecordDict | Error = answers[-1]("join", pack_instruction(*instruct(study, "join")), study.run_config())
        return found

    assert isinstance(asked_of(None), RecordDict)  # a site without a gateway
    (tmp_path / "site").mkdir()
    refused = asked_of(tmp_path / "site")  # a gateway that was never asked
    assert isinstance(refused, Error)
    assert refused.code == ApprovalError.code
    now = datetime.now(UTC)
    decide(tmp_path / "site", note_study(tmp_path / "site", study, now), "approved", now)
    assert isinstance(asked_of(tmp_path / "site"), RecordDict)
    with pytest.raises(NotPreparedError, match="approvals"):
        serve(sites[0].folder, socket, tmp_path / "mistyped")


def test_a_worker_that_is_just_starting_is_waited_for(study: Study, sites: list[Site], socket: Path) -> None:
    over = threading.Event()

    def start() -> None:
        time.sleep(0.3)
        with working(socket):
            over.wait(60)

    thread = threading.Thread(target=start)
    thread.start()
    assert asked(study, "join", {"worker": str(socket)}).has_content()
    over.set()
    thread.join()


def test_a_worker_that_is_killed_while_it_computes_is_one_message_s_failure(
    study: Study, sites: list[Site], socket: Path
) -> None:
    script = (
        "import os, pathlib, sys; from client.worker.serve import serving\n"
        "with serving(pathlib.Path(sys.argv[1]), lambda *_: os.kill(os.getpid(), 9), list):\n"
        "    print(flush=True); input()"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", script, socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    ) as process:
        assert process.stdout
        process.stdout.readline()
        incident(asked(study, "train", {"worker": str(socket)}))
        assert process.wait(60) == -9
    with working(socket):  # where the other left its socket
        assert asked(study, "train", {"worker": str(socket)}).has_content()


def test_what_a_worker_raises_stays_with_it(study: Study, sites: list[Site], socket: Path) -> None:
    def fail(*_: object) -> RecordDict:
        raise ValueError(SECRET)

    with working(socket, fail):
        reply = asked(study, "train", {"worker": str(socket)})
    incident(reply)
    assert SECRET.encode() not in wire_bytes(reply)


def test_a_worker_that_hangs_is_noticed_by_both(study: Study, sites: list[Site], socket: Path) -> None:
    over, noticed = threading.Event(), threading.Event()
    with working(socket, lambda *_: over.wait(60), noticed.set):
        incident(asked(study, "train", {"worker": str(socket)}, ttl=3.0))
        assert noticed.wait(60)
        over.set()


def test_one_message_at_a_time_and_none_for_a_clientapp_that_has_gone(socket: Path) -> None:
    began, over, count = threading.Event(), threading.Event(), []

    def slow(*_: object) -> RecordDict:
        count.append(threading.active_count())
        began.set()
        assert over.wait(60)
        return RecordDict()

    with working(socket, slow), grpc.insecure_channel(f"unix:{socket}") as channel:
        question = pack_question("join", RecordDict(), {})
        call = channel.unary_unary("/wardround.Worker/Answer")
        first = call.future(question, timeout=60)
        assert began.wait(60)
        second, third = call.future(question, timeout=60), call.future(question, timeout=60)
        time.sleep(0.2)  # both are there, and wait
        second.cancel()
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60).status == 1
        assert len(count) == 1
        over.set()
        first.result()
        third.result()
    assert len(count) == 2


def test_only_a_folder_that_is_nobody_else_s_will_do(socket: Path) -> None:
    with working(socket):
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        with pytest.raises(NotPreparedError, match="already"), working(socket):
            pass
    socket.parent.chmod(0o755)
    with pytest.raises(NotPreparedError, match="chmod 0700"), working(socket):
        pass
    socket.parent.chmod(0o700)
    with pytest.raises(NotPreparedError, match="107 bytes"), working(socket.with_name("long" * 30)):
        pass


@given(st.binary())
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(ContractError):
        unpack_question(data)


def test_question_and_answer_come_back_as_they_were() -> None:
    config: dict[str, object] = {"outer.rate": 0.1, "study.rounds": 3, "algorithm.recompute": False, "study.id": "ä\n"}
    content = pack_instruction(*instruct(tiny_study(), "train"))
    for kind in KINDS:
        assert unpack_question(pack_question(kind, content, config)) == (kind, content, config)
    assert unpack_answer(pack_answer(content)) == content
    error = unpack_answer(pack_answer(Error(104, "incident 0a1b2c3d")))
    assert isinstance(error, Error)
    assert (error.code, error.reason) == (104, "incident 0a1b2c3d")
    with pytest.raises(ContractError, match="does not know"):
        unpack_question(pack_question("stop", content, config))  # type: ignore[arg-type]


def test_a_large_theta_goes_through(socket: Path) -> None:
    study = tiny_study()
    instruction, _ = instruct(study, "train")
    content = pack_instruction(replace(instruction), np.ones(2_000_000, np.float32))  # twice gRPC's own limit
    with working(socket, lambda _kind, got, _config: got):
        assert hand_over(str(socket), "train", content, study.run_config(), 60.0) == content

"""The ClientApp: what it answers, what it refuses, and that no exception's text leaves the site."""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import answers as client_answers
from client import evaluation
from client import release as client_release
from client import session as client_session
from client.app import app
from client.data.episodes import draw
from client.data.store import Site
from client.session import virtual_site
from common.contract import Vector, check_reply, theta_digest
from common.errors import ContractError, DataError, NotPreparedError, StudyError, WardroundError
from common.study import Study
from simulations.engines.inprocess import InProcessGrid
from tests.client.hospitals import SITES, ask, instruct, tiny_study, wire_bytes

PATIENT = "Kowalska^Zofia"
PATH = "/data/pacs/Kowalska_Zofia_19511224/study-7"
DECLARED = {WardroundError.code, *(kind.code for kind in WardroundError.__subclasses__())}

#: Ways in which computing may fail; their text names a patient and a path.
FAILURES: list[Exception] = [
    ValueError(f"{PATIENT} in {PATH}"),
    FileNotFoundError(2, f"No such file: {PATIENT}", PATH),
    KeyError(PATIENT),
    DataError(f"{PATIENT}: cannot read {PATH}"),
    UnicodeDecodeError("utf-8", PATIENT.encode(), 0, 1, PATH),
    MemoryError(PATH),
    RecursionError(PATIENT),
    type(PATIENT.replace("^", ""), (RuntimeError,), {})(PATIENT),  # even the type's name tells
]


def incident(reply: Message) -> str:
    """Return the incident number of a reply that holds a code and such a number, and nothing else."""
    assert reply.has_error()
    assert not reply.has_content()
    assert reply.error.code in DECLARED
    match = re.fullmatch(r"incident ([0-9a-f]{8})", reply.error.reason or "")
    assert match
    everything = wire_bytes(reply)
    for canary in (PATIENT, PATH, "Kowalska", "Zofia", "19511224"):
        for text in (canary.encode(), canary.encode("utf-16-le"), repr(canary).encode()[1:-1]):
            assert text not in everything
    assert str(Path.home()).encode() not in everything
    assert b"Traceback" not in everything
    return match[1]


@pytest.fixture
def log(sites: list[Site]) -> Iterator[Path]:
    """The first hospital's log of incidents, empty."""
    path = sites[0].folder / "incidents.log"
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_joining_says_which_site_it_is(study: Study, sites: list[Site]) -> None:
    instruction, _ = instruct(study, "join")
    for index in range(SITES):
        reply = ask(study, index, instruction, None)
        assert check_reply(reply.content, instruction, size=0, dtype="float32").scalars == {"site": index}


def test_training_depends_on_the_round_and_not_on_the_attempt(study: Study, sites: list[Site]) -> None:
    instruction, theta = instruct(study, "train")
    assert theta is not None

    def answer(number: int, attempt: int) -> bytes:
        asked = replace(instruction, round=number, attempt=attempt)
        vector = check_reply(ask(study, 0, asked, theta).content, asked, size=theta.size, dtype="float32").vector
        assert vector is not None
        return vector.tobytes()

    first = answer(1, 1)
    assert answer(1, 2) == first  # a retry shows nothing new about the patients
    assert answer(2, 1) != first


def test_training_episodes_may_have_more_ways_than_test_episodes(
    study: Study, sites: list[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(client_release, "draw", spy)
    monkeypatch.setattr(evaluation, "draw", spy)
    changed = study.override({"episodes.ways": 2, "episodes.train-ways": 3})
    for kind in ("train", "evaluate"):
        assert not ask(changed, 0, *instruct(changed, kind)).has_error()
    assert [episodes.classes.shape[1] for episodes in drawn] == [3, 2, 2]


def test_training_starts_at_the_theta_that_was_sent(study: Study, sites: list[Site]) -> None:
    instruction, theta = instruct(study, "train", number=2)
    assert theta is not None
    step = np.float32(study.outer.rate) * np.sin(np.arange(theta.size, dtype=np.float32))
    moved = (theta + step).astype(np.float32)
    answers = []
    for sent in (theta, moved):
        assert ask(study, 0, *instruct(study, "join")).has_content()  # another run: a round has one theta in a run
        answers.append(ask(study, 0, replace(instruction, theta=_digest(study, sent)), sent))
    one, two = (answer.content.array_records["meta_gradient"]["meta_gradient"].data for answer in answers)
    assert one != two


def _digest(study: Study, theta: Vector) -> str:
    session = client_session.open_session(study.run_config(), {"partition-id": 0})
    return theta_digest(theta, {name: tuple(t.shape) for name, t in session.theta.items()})


def test_theta_must_be_the_one_that_the_instruction_names(study: Study, sites: list[Site], log: Path) -> None:
    instruction, theta = instruct(study, "train")
    assert theta is not None
    reply = ask(study, 0, instruction, np.nextafter(theta, np.float32(1)))
    assert reply.error.code == ContractError.code
    assert incident(reply) in log.read_text()
    assert "theta is not the one" in log.read_text()


def test_a_held_out_site_never_trains(study: Study, sites: list[Site]) -> None:
    reply = ask(study, 3, *instruct(study, "train"))
    assert reply.error.code == ContractError.code
    incident(reply)


def test_a_study_that_withholds_figures_gets_none(study: Study, sites: list[Site], log: Path) -> None:
    quiet = tiny_study({"privacy.figures": "withheld"})
    for plan in (study, quiet):
        instruction, theta = instruct(plan, "train")
        assert theta is not None
        reply = ask(plan, 0, instruction, theta)
        answer = check_reply(reply.content, instruction, size=theta.size, dtype="float32")
        assert answer.vector is not None
        session = client_session.open_session(plan.run_config(), {"partition-id": 0})
        generator = session.site.generator("train", plan.digest, 1)
        spec = plan.episodes
        episodes = draw(session.site, session.training_pool(), spec, spec.per_round, generator, augment=True)
        result = session.engine.meta_gradient(session.theta, episodes)
        assert answer.vector.tobytes() == result.gradient.numpy().tobytes()
        sent = [struct.pack("<d", float(value)) in wire_bytes(reply) for value in (result.loss, result.accuracy)]
        assert sent == ([True, True] if plan is study else [False, False])
        assert (set(answer.scalars.values()) == {-1.0}) == (plan is quiet)


def test_a_study_that_withholds_figures_is_joined_and_never_evaluated(
    study: Study, sites: list[Site], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Untouched:
        def __getitem__(self, _: object) -> np.ndarray:
            raise AssertionError("an image was read")

    quiet = tiny_study({"privacy.figures": "withheld"})
    session = client_session.open_session(quiet.run_config(), {"partition-id": 0})
    untouched = replace(session, site=replace(session.site, cache=cast(Any, Untouched())))
    monkeypatch.setattr(client_answers, "open_session", lambda *_: untouched)
    instruction, _ = instruct(quiet, "join")
    assert check_reply(ask(quiet, 0, instruction, None).content, instruction, size=0, dtype="float32").scalars
    for side in ("validation", "test"):
        reply = ask(quiet, 0, *instruct(quiet, "evaluate", side=side, scratch=True))
        assert reply.error.code == ContractError.code
        assert incident(reply) in log.read_text()
    assert "an image was read" not in log.read_text()
    assert log.read_text().count("privacy.figures") >= 2


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__[:12])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_the_text_of_an_exception_stays_at_the_site(
    study: Study, sites: list[Site], log: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    module: Any = client_release if kind == "train" else __import__("client.evaluation", fromlist=["draw"])
    monkeypatch.setattr(module, "draw", failing(error))
    reply = ask(study, 0, *instruct(study, kind))
    number = incident(reply)
    assert reply.error.code == (error.code if isinstance(error, WardroundError) else WardroundError.code)
    written = log.read_text()
    assert f"incident {number}\n" in written
    assert "Traceback" in written
    assert "Kowalska" in written


def test_exceptions_while_reading_pixels_and_while_answering(
    study: Study, sites: list[Site], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreadable:
        def __getitem__(self, _: object) -> np.ndarray:
            raise OSError(5, f"Input/output error of {PATIENT}", PATH)

    session = client_session.open_session(study.run_config(), {"partition-id": 0})
    with monkeypatch.context() as patch:
        broken = replace(session.site, cache=cast(Any, Unreadable()))
        patch.setattr(client_answers, "open_session", lambda *_: replace(session, site=broken))
        first = incident(ask(study, 0, *instruct(study, "train")))
    with monkeypatch.context() as patch:
        patch.setattr(client_answers, "pack_reply", failing(ValueError(PATIENT)))
        second = incident(ask(study, 0, *instruct(study, "join")))
    assert first != second
    assert re.findall(r"^incident (\w+)$", log.read_text(), re.MULTILINE) == [first, second]


def test_a_log_that_cannot_be_written_changes_nothing(
    study: Study, sites: list[Site], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flower sends the text of whatever the ClientApp raises, here the site's path.
    log.mkdir()
    monkeypatch.setattr(client_release, "draw", failing(ValueError(PATIENT)))
    try:
        incident(ask(study, 0, *instruct(study, "train")))
    finally:
        log.rmdir()


@pytest.mark.parametrize("kind", ["join", "train", "evaluate"])
def test_a_site_that_is_not_prepared_says_so_and_makes_no_folder(kind: str) -> None:
    study = tiny_study({"data.seed": 404})  # other data: nobody prepared them
    reply = ask(study, 0, *instruct(study, kind))
    incident(reply)
    assert reply.error.code == NotPreparedError.code
    assert not virtual_site(study, 0).parent.exists()


@pytest.mark.parametrize("kind", ["join", "train", "evaluate"])
def test_a_message_that_cannot_be_read_is_refused(study: Study, sites: list[Site], log: Path, kind: str) -> None:
    grid = InProcessGrid(app, study.run_config(), SITES)
    types = {"join": "query.join", "train": "train", "evaluate": "evaluate"}
    contents = [
        RecordDict(),
        RecordDict({PATIENT: ConfigRecord({PATH: PATIENT})}),
        RecordDict({"instruction": ConfigRecord({"kind": kind, "study": PATIENT})}),
    ]
    for content in contents:
        node = next(iter(grid.get_node_ids()))
        ids = list(grid.push_messages([Message(content, node, types[kind])]))
        (reply,) = grid.pull_messages(ids)
        assert incident(reply) in log.read_text()
        assert reply.error.code == ContractError.code


def test_an_instruction_under_another_message_type_is_refused(study: Study, sites: list[Site], log: Path) -> None:
    for kind in ("join", "train", "evaluate"):
        for other in {"query.join", "train", "evaluate"} - {{"join": "query.join"}.get(kind, kind)}:
            reply = ask(study, 0, *instruct(study, kind), message_type=other)
            assert reply.error.code == ContractError.code, (kind, other)
            incident(reply)


def test_a_study_that_is_not_valid_is_refused(study: Study) -> None:
    instruction, theta = instruct(study, "train")
    broken = [{**study.run_config(), "outer.rate": "fast"}, {**study.run_config(), f"outer.{PATIENT}": PATH}]
    for config in broken:
        reply = ask(study, 0, instruction, theta, run_config=config)
        assert reply.error.code == StudyError.code
        incident(reply)


def test_another_study_than_the_sites_is_refused(study: Study, sites: list[Site], log: Path) -> None:
    reply = ask(study, 0, *instruct(study, "join"), run_config=study.override({"outer.rate": 0.5}).run_config())
    assert reply.error.code == ContractError.code
    assert "the message belongs to the study" in log.read_text()


def test_a_node_without_a_site_says_how_to_start_it(study: Study) -> None:
    with pytest.raises(NotPreparedError, match="--node-config"):
        client_session.open_session(study.run_config(), {})
    context = Context(1, 7, {}, RecordDict(), dict(study.run_config()))
    reply = app(Message(RecordDict(), 7, "query.join"), context)
    assert reply.error.code == NotPreparedError.code


def test_not_finite_results_are_not_sent(
    study: Study, sites: list[Site], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = client_session.open_session(study.run_config(), {"partition-id": 0})
    original = type(session.engine).meta_gradient

    def broken(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return result._replace(gradient=torch.full_like(result.gradient, torch.nan))

    monkeypatch.setattr(type(session.engine), "meta_gradient", broken)
    reply = ask(study, 0, *instruct(study, "train"))
    assert reply.error.code == ContractError.code
    assert incident(reply) in log.read_text()

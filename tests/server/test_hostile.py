"""Sites that send rubbish, on purpose or not: each reply is one rejection with its word, and nobody else suffers."""

import itertools
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.contract import Instruction, Vector, pack_reply
from common.errors import DataError
from common.study import Study
from server import rounds
from server.record import RunRecord
from simulations.engines.inprocess import Fault, InProcessGrid
from tests.server.scripted import Scripted, Spoil, a_grid, a_study, events, history, run, vector_of

RUNS = itertools.count(4 * 10**6)
SITE, ROUND = 1, 2  # who is hostile and when: others come before and after, and the optimiser has a past
NAME = f"hospital-{SITE}"
PATIENT = "Kowalska^Zofia"

#: Makes a hostile reply of a good one.
Change = Callable[[Instruction, RecordDict, Message], RecordDict | Message]


@dataclass(frozen=True)
class Case:
    """A hostile reply, and the word and code of its rejection."""

    why: str
    change: Change
    code: int = 102


def vector(change: Callable[[Vector], NDArray[Any]]) -> Change:
    """Send another vector."""
    return arrays(lambda good: {"meta_gradient": Array(change(good))})


def arrays(make: Callable[[Vector], dict[str, Array]]) -> Change:
    """Send other arrays in the record of the vector."""

    def apply(instruction: Instruction, content: RecordDict, _: Message) -> RecordDict:
        good = content.array_records["meta_gradient"]["meta_gradient"].numpy()
        content["meta_gradient"] = ArrayRecord(make(good))
        return content

    return apply


def raw(make: Callable[[Array, Vector], Array]) -> Change:
    """Send an array whose bytes are not what it says."""
    return arrays(lambda good: {"meta_gradient": make(Array(good), good)})


def scalars(**changes: Any) -> Change:
    """Send other scalars."""

    def apply(instruction: Instruction, content: RecordDict, _: Message) -> RecordDict:
        content.metric_records["scalars"].update(changes)
        return content

    return apply


def records(change: Callable[[RecordDict], object]) -> Change:
    """Send other records."""

    def apply(instruction: Instruction, content: RecordDict, _: Message) -> RecordDict:
        change(content)
        return content

    return apply


def answers(**other: Any) -> Change:
    """Answer another instruction, in the best of forms."""

    def apply(instruction: Instruction, content: RecordDict, _: Message) -> RecordDict:
        good = content.array_records["meta_gradient"]["meta_gradient"].numpy()
        return pack_reply(replace(instruction, **other), {"loss": 1.0, "accuracy": 0.5}, good)

    return apply


def error(code: int, reason: str) -> Change:
    return lambda instruction, content, message: Message(Error(code, reason), reply_to=message)


def one(value: float) -> Callable[[Vector], Vector]:
    """Return what puts a value in the place of one number."""

    def change(good: Vector) -> Vector:
        out = good.copy()
        out[len(out) // 2] = value
        return out

    return change


def renamed(content: RecordDict) -> None:
    content[PATIENT] = content.pop("meta_gradient")


class Unpickled:
    """Says so when somebody is careless enough."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a reply was unpickled",)


CASES: dict[str, Case] = {
    "NaN": Case("not-finite", vector(one(np.nan))),
    "infinite": Case("not-finite", vector(one(-np.inf))),
    "1e30": Case("norm", vector(one(1e30))),
    "the largest numbers": Case("norm", vector(lambda v: np.full_like(v, 3e38))),
    "zeros": Case("zero", vector(np.zeros_like)),
    "an array of another name": Case("arrays", arrays(lambda v: {PATIENT: Array(v)})),
    "a record of another name": Case("records", records(renamed)),
    "no vector": Case("records", records(lambda content: content.pop("meta_gradient"))),
    "no array": Case("arrays", arrays(lambda _: {})),
    "an array more": Case("arrays", arrays(lambda v: {"meta_gradient": Array(v), PATIENT: Array(v)})),
    "two records of arrays": Case(
        "records", records(lambda content: content.update({PATIENT: content["meta_gradient"]}))
    ),
    "notes": Case("records", records(lambda content: content.update(notes=ConfigRecord({"patient": PATIENT})))),
    "text for arrays": Case(
        "arrays", records(lambda content: content.update(meta_gradient=ConfigRecord({"meta_gradient": PATIENT})))
    ),
    "an empty reply": Case("records", records(RecordDict.clear)),
    "one number, to be broadcast": Case("shape", vector(lambda v: v[:1])),
    "a number without a shape": Case("shape", vector(lambda v: np.array(v[0]))),
    "a row": Case("shape", vector(lambda v: v.reshape(1, -1))),
    "a number too many": Case("shape", vector(lambda v: np.append(v, np.float32(1)))),
    "ten times the size": Case("shape", vector(lambda v: np.tile(v, 10))),
    "float64": Case("shape", vector(lambda v: v.astype(np.float64))),
    "int": Case("shape", vector(lambda v: np.ones(v.shape, np.int32))),
    "bytes of another type": Case(
        "shape", raw(lambda a, v: Array(a.dtype, a.shape, a.stype, Array(v.astype(np.float64)).data))
    ),
    "bytes after the numbers": Case(
        "shape", raw(lambda a, _: Array(a.dtype, a.shape, a.stype, a.data + PATIENT.encode()))
    ),
    "bytes before the numbers": Case(
        "shape", raw(lambda a, _: Array(a.dtype, a.shape, a.stype, a.data.replace(b"     ", b"Zofia", 1)))
    ),
    "a pickle": Case("shape", raw(lambda a, _: Array(a.dtype, a.shape, a.stype, pickle.dumps(Unpickled())))),
    "another kind of array": Case("shape", raw(lambda a, _: Array(a.dtype, a.shape, PATIENT, a.data))),
    "a weight of its own": Case("scalars", scalars(weight=1e9)),
    "a count of patients": Case("scalars", scalars(**{"num-examples": 12})),
    "no scalars": Case("scalars", records(lambda content: content.update(scalars=MetricRecord()))),
    "text for scalars": Case(
        "scalars", records(lambda content: content.update(scalars=ConfigRecord({"loss": PATIENT})))
    ),
    "a list of losses": Case("scalar-type", scalars(loss=[1.0, 2.0])),
    "a loss that is NaN": Case("scalar-range", scalars(loss=float("nan"))),
    "an accuracy beyond one": Case("scalar-range", scalars(accuracy=1.5)),
    "no token": Case("scalars", records(lambda content: content.metric_records["scalars"].pop("token"))),
    "another token": Case("other-instruction", scalars(token=1)),
    "a reply for another round": Case("other-instruction", answers(round=1)),
    "a reply for another attempt": Case("other-instruction", answers(attempt=2)),
    "a reply for another theta": Case("other-instruction", answers(theta="0" * 64)),
    "a reply for another study": Case("other-instruction", answers(study="0" * 64)),
    "an error of 10 MB": Case("error", error(DataError.code, f"{PATIENT} " * 700_000), DataError.code),
    "an error of many lines": Case("error", error(DataError.code, f"incident 0123abcd\n{PATIENT}"), DataError.code),
    "an error of no known code": Case("error", error(-(2**31), PATIENT), -(2**31)),
}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(rounds, "_PAUSE_SECONDS", 0.0)


def when(kind: str, number: int, change: Change) -> Spoil:
    def spoil(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict | Message:
        asked = (site, instruction.kind, instruction.round) == (SITE, kind, number)
        return change(instruction, content, message) if asked else content

    return spoil


def three_rounds() -> Study:
    return a_study({"study.rounds": 3})


def theta(record: RunRecord) -> bytes:
    return (record.folder / "theta.safetensors").read_bytes()


def result_of(fault: Fault | None) -> bytes:
    study = three_rounds()
    return theta(run(study, a_grid(study, fault=fault), next(RUNS)))


@pytest.fixture(scope="module")
def without() -> bytes:
    """Theta of the run in which the site does not answer in that round."""

    def fault(site: int, message: Message) -> str | None:
        asked = site == SITE and message.metadata.message_type == "train"
        return "crash" if asked and message.content.config_records["instruction"]["round"] == ROUND else None

    return result_of(fault)


@pytest.fixture(scope="module")
def undisturbed() -> bytes:
    """Theta of the run in which everything counts."""
    return result_of(None)


def check_one_rejection(record: RunRecord, why: str, code: int = 102) -> None:
    """Check that the site is out of that round with its reason, and of no other, and stands in the events once."""
    first, second, third = history(record)
    (refusal,) = second["out"]
    assert (refusal["site"], refusal["why"], refusal["code"]) == (NAME, why, code)
    assert 10 < len(refusal["reason"]) < 200
    assert first["out"] == third["out"] == []
    assert [set(line["sites"]) for line in (first, second, third)] == [
        {"hospital-0", NAME, "hospital-2"},
        {"hospital-0", "hospital-2"},
        {"hospital-0", NAME, "hospital-2"},
    ]
    (event,) = events(record, "rejected", "late", "duplicate", "unasked", "failed-attempt")
    assert event["event"] == "rejected"
    assert {key: event[key] for key in refusal} == refusal
    assert (event["round"], event["attempt"]) == (ROUND, 1)


def check_silence(record: RunRecord, said: list[str], capture: pytest.CaptureFixture[str]) -> None:
    """Check that nothing of the hostile text is in a file of the run, or was printed."""
    files = [path for path in record.folder.rglob("*") if path.is_file()]
    assert {"history.jsonl", "events.jsonl", "status.json", "state.json"} <= {path.name for path in files}
    printed = capture.readouterr()
    for text in (*(path.read_bytes() for path in files), *(t.encode() for t in (*said, printed.out, printed.err))):
        assert b"Kowalska" not in text
        assert b"Zofia" not in text


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_reply_is_one_rejection(name: str, without: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    case, study, said = CASES[name], three_rounds(), list[str]()
    record = run(study, a_grid(study, spoil=when("train", ROUND, case.change)), next(RUNS), said)
    check_one_rejection(record, case.why, case.code)
    assert theta(record) == without
    check_silence(record, said, capfd)


def test_every_word_for_a_breach_has_its_case() -> None:
    known = {"records", "scalars", "scalar-type", "scalar-range", "other-instruction", "arrays", "shape", "not-finite",
             "zero", "norm", "error"}  # fmt: skip
    assert {case.why for case in CASES.values()} == known


def test_a_reply_that_was_kept_and_sent_again_is_refused(without: bytes) -> None:
    kept: list[RecordDict] = []

    def spoil(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict:
        if (site, instruction.kind) != (SITE, "train") or instruction.round > ROUND:
            return content
        kept.append(content)
        return kept[0]

    study = three_rounds()
    record = run(study, a_grid(study, spoil=spoil), next(RUNS))
    check_one_rejection(record, "other-instruction")
    assert theta(record) == without


class Unreadable(InProcessGrid):
    """Flower raises where a reply cannot be put together again."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.has_content() and reply.metadata.src_node_id == 1000 + SITE and _is_of(reply, ROUND):
                raise ValueError(f"no object of {PATIENT}")
        return replies


def _is_of(reply: Message, number: int) -> bool:
    record = reply.content.array_records.get("meta_gradient")
    return record is not None and np.array_equal(
        record["meta_gradient"].numpy(), vector_of(SITE, number, record["meta_gradient"].shape[0])
    )


def test_a_reply_that_cannot_be_put_together_is_one_rejection(
    without: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    study, said = three_rounds(), list[str]()
    record = run(study, Unreadable(Scripted(study), study.run_config(), study.data.sites), next(RUNS), said)
    check_one_rejection(record, "unreadable", 0)
    assert theta(record) == without
    check_silence(record, said, capfd)


class Twice(InProcessGrid):
    """Hands a reply over twice: at once, or again with that of whoever is asked next."""

    at_once = True
    again: Message | None = None

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        if replies and (again := self.again):
            self.again = None
            return [again, *replies]
        for reply in replies:
            if reply.has_content() and reply.metadata.src_node_id == 1000 + SITE and _is_of(reply, ROUND):
                if self.at_once:
                    return [reply, reply]
                self.again = reply
        return replies


@pytest.mark.parametrize("at_once", [True, False])
def test_the_same_reply_twice_counts_once(at_once: bool, undisturbed: bytes, without: bytes) -> None:
    study = three_rounds()
    grid = Twice(Scripted(study), study.run_config(), study.data.sites)
    grid.at_once = at_once
    record = run(study, grid, next(RUNS))
    (event,) = events(record, "rejected", "late", "duplicate", "unasked", "failed-attempt")
    assert (event["event"], event["site"], event["round"]) == ("duplicate", NAME, ROUND)
    assert all(line["out"] == [] and len(line["sites"]) == 3 for line in history(record))
    assert theta(record) == undisturbed != without


def test_a_site_that_is_hostile_when_it_joins_is_left_out_and_told(capfd: pytest.CaptureFixture[str]) -> None:
    study, said = three_rounds(), list[str]()
    change = records(lambda content: content.update(notes=ConfigRecord({"patient": PATIENT})))
    record = run(study, a_grid(study, spoil=when("join", 0, change)), next(RUNS), said)
    assert all(set(line["sites"]) == {"hospital-0", "hospital-2"} for line in history(record))
    (event,) = events(record, "rejected")
    assert (event["site"], event["why"]) == ("node 1001", "records")
    check_silence(record, said, capfd)


def test_a_site_that_is_hostile_in_an_evaluation_judges_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    study, said = three_rounds(), list[str]()
    spoil = when("evaluate", 3, scalars(**{"known.after.mean": float("nan")}))
    record = run(study, a_grid(study, spoil=spoil), next(RUNS), said)
    (line,) = record.evaluations()
    assert set(line["sites"]) == {"hospital-0", "hospital-2", "hospital-3"}
    assert set(line["out"]) == {NAME}
    assert line["score"] == 0.5
    check_silence(record, said, capfd)

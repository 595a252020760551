"""Sites that send rubbish, on purpose or not: each reply is one rejection with its word, and nobody else suffers."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from common.contract import Instruction
from common.errors import RoundError
from common.study import Study
from server import rounds
from server.record import RunRecord
from simulations.engines.inprocess import Fault, InProcessGrid
from tests.server.rubbish import CASES, PATIENT, Change, records, scalars
from tests.server.scripted import Scripted, Spoil, a_grid, a_study, events, history, run, vector_of

RUNS = itertools.count(4 * 10**6)
SITE, ROUND = 1, 2  # who is hostile and when: others come before and after, and the optimiser has a past
NAME = f"hospital-{SITE}"


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
    # Once before the first round, and once when it is asked again.
    assert [(event["site"], event["why"]) for event in events(record, "rejected")] == [("node 1001", "records")] * 2
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


@pytest.mark.parametrize(
    ("rule", "more", "needed"),
    [("krum", {}, 5), ("multi-krum", {"aggregation.selected": 2}, 5), ("median", {"aggregation.tolerated": 2}, 5)],
)
def test_too_few_sites_for_the_hostile_ones_are_refused_at_the_start(
    rule: str, more: dict[str, Any], needed: int
) -> None:
    study = a_study({"aggregation.rule": rule, "aggregation.tolerated": 1, "sites.join-seconds": 0.2, **more})
    grid = a_grid(study)
    with pytest.raises(RoundError, match=f"3 training sites joined, the rule {rule} needs {needed} to withstand"):
        run(study, grid, next(RUNS))
    assert isinstance(grid.client, Scripted)
    assert {instruction.kind for _, instruction in grid.client.asked} == {"join"}

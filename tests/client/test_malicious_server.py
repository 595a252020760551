"""A coordinator that plays tricks: each is refused with its code before anything of the site's data is opened."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from typer.testing import CliRunner

from client import session as client_session
from client.app import app
from client.cli import app as commands
from client.data.store import Site
from client.gateway.approvals import decide, note_study
from client.ledger import open_ledger
from client.session import first_theta, virtual_site
from client.trail import thetas_of
from common.contract import Instruction, Vector, pack_instruction, theta_digest
from common.errors import ApprovalError, ContractError, ThetaError
from common.study import Study
from simulations.engines.inprocess import transmit
from tests.client.hospitals import instruct, tiny_study

RATE = 0.01
ROUNDS = 20
NOW = datetime(2026, 7, 1, tzinfo=UTC)

#: What the site may look at before it has decided: its own books, none of which holds anything of a patient.
BOOKS = {"ledger.sqlite", "ledger.sqlite-journal", "thetas", "approvals", "incidents.log"}


@dataclass
class Spy:
    """Which files are opened under a folder: every call of Python's ``open`` and of SQLite's."""

    folder: str = ""
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder and event in {"open", "sqlite3.connect"}:
            _, here, name = str(arguments[0]).partition(self.folder + "/")  # SQLite's may be an address: file:/...
            self.seen.extend([name.partition("?")[0]] if here else [])

    @property
    def data(self) -> list[str]:
        """What was opened besides the books."""
        return [name for name in self.seen if not set(name.split("/")) & BOOKS]


_SPY = Spy()
sys.addaudithook(_SPY)  # for good: it does nothing without a folder


@dataclass
class Hospital:
    """A site as the coordinator sees it, with a spy inside."""

    study: Study
    folder: Path
    spy: Spy
    node: dict[str, Any] = field(default_factory=lambda: {"partition-id": 0})

    def ask(
        self,
        kind: Any,
        number: int = 1,
        theta: Vector | None = None,
        *,
        message_type: str = "",
        run: Study | None = None,
        change: Callable[[RecordDict], object] = lambda _: None,
        **fields: Any,
    ) -> Message:
        """Send a message and return the answer; theta is the study's first one, or another, rightly named."""
        instruction, first = instruct(self.study, kind, number=number)
        if theta is not None:
            shapes = {name: tuple(tensor.shape) for name, tensor in first_theta(self.study).items()}
            instruction = replace(instruction, theta=theta_digest(theta, shapes))
        content = pack_instruction(replace(instruction, **fields), first if theta is None else theta)
        change(content)
        types = {"join": "query.join", "train": "train", "evaluate": "evaluate"}
        message = Message(content, 7, message_type or types[kind])
        message.metadata.__dict__["_message_id"] = "1"
        client_session._session.cache_clear()  # as in a process of its own: what was opened before is opened again
        self.spy.seen.clear()
        return app(transmit(message)[0], Context(1, 7, self.node, RecordDict(), dict((run or self.study).run_config())))

    def refuses(self, answer: Message, code: int, text: str) -> None:
        """Check that the answer is a code and an incident number, why, and that no data were opened."""
        assert answer.has_error(), "it was answered"
        assert answer.error.code == code
        (number,) = [line for line in [(answer.error.reason or "").removeprefix("incident ")] if len(line) == 8]
        written = (self.folder / "incidents.log").read_text().partition(f"incident {number}\n")[2]
        assert text in written
        assert self.spy.data == []

    def spent(self) -> int:
        with open_ledger(self.folder) as ledger:
            return sum(part.rounds.count for part in ledger.spent() if part.study == self.study.digest)


@pytest.fixture
def hospital(request: pytest.FixtureRequest, sites: list[Site]) -> Iterator[Hospital]:
    """The first hospital in a study of this test's own."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[:60].strip("-")
    study = tiny_study({"study.id": name, "study.rounds": ROUNDS, "outer.rate": RATE, **getattr(request, "param", {})})
    folder = virtual_site(study, 0)
    (folder / "incidents.log").unlink(missing_ok=True)
    _SPY.folder = str(folder)
    yield Hospital(study, folder, _SPY)
    _SPY.folder = ""


GUARANTEED = {
    "privacy.mechanism": "episode-clip",
    "privacy.clip": 0.5,
    "privacy.noise": 1.0,
    "privacy.sampling": 0.8,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}
guaranteed = pytest.mark.parametrize("hospital", [GUARANTEED], indirect=True)


def first(hospital: Hospital) -> Vector:
    theta = instruct(hospital.study, "train")[1]
    assert theta is not None
    return theta


def moved(theta: Vector, by: float, number: int = 3) -> Vector:
    """Return theta with one of its numbers moved."""
    out = theta.copy()
    out[number] += by
    return out


def test_an_honest_coordinator_is_answered_and_the_spy_sees_what_is_opened(hospital: Hospital) -> None:
    assert hospital.ask("join").has_content()
    theta, seen = first(hospital), []
    for number in (1, 2, 2, 4):
        answer = hospital.ask("train", number, moved(theta, RATE * (number - 1)))
        assert answer.has_content()
        assert {name.split("/")[0] for name in hospital.spy.data} >= {"catalogue.sqlite", "cache", "site.key"}
        seen.append(answer.content.array_records["meta_gradient"]["meta_gradient"].data)
    assert seen[1] == seen[2]  # a round that is asked for again is the same
    assert hospital.ask("evaluate", ROUNDS, moved(theta, RATE * ROUNDS)).has_content()


# Changed study numbers.


@guaranteed
def test_a_run_with_other_numbers_than_the_study_that_it_names(hospital: Hospital) -> None:
    for change in ({"privacy.noise": 0.01}, {"privacy.clip": 50.0}, {"privacy.sampling": 1.0}, {"sites.quorum": 1}):
        other = hospital.study.override(change)
        hospital.refuses(hospital.ask("train", run=other), ContractError.code, "belongs to the study")
    assert hospital.spent() == 0


@guaranteed
def test_another_study_altogether_where_the_site_says_what_it_approved(hospital: Hospital, tmp_path: Path) -> None:
    approved = note_study(tmp_path, hospital.study, NOW)
    hospital.node["approvals"] = str(tmp_path)
    hospital.refuses(hospital.ask("train"), ApprovalError.code, "waits for this site's approval")
    decide(tmp_path, approved, "approved", NOW)
    assert hospital.ask("train").has_content()
    weaker = Hospital(hospital.study.override({"privacy.noise": 0.01}), hospital.folder, hospital.spy, hospital.node)
    weaker.refuses(weaker.ask("train"), ApprovalError.code, "waits for this site's approval")
    assert weaker.spent() == 0
    decide(tmp_path, approved, "rejected", NOW)
    hospital.refuses(hospital.ask("train", 2), ApprovalError.code, "rejected")


def test_a_study_that_is_over(hospital: Hospital, tmp_path: Path) -> None:
    over = Hospital(hospital.study.override({"study.expires": "2020-01-01"}), hospital.folder, hospital.spy)
    over.node["approvals"] = str(tmp_path)
    decide(tmp_path, note_study(tmp_path, over.study, NOW), "approved", NOW)
    over.refuses(over.ask("train"), ApprovalError.code, "expired")


# Trap weights.


def not_finite(theta: Vector) -> Vector:
    return moved(theta, np.nan)


def huge(theta: Vector) -> Vector:
    return (theta * np.float32(1e30)).astype(np.float32)


def biased(theta: Vector) -> Vector:
    """Every number as a trap in a first layer would have it: large, and of one sign."""
    return np.abs(theta) + np.float32(5)


@pytest.mark.parametrize("number", [1, 2, ROUNDS])
@pytest.mark.parametrize(("trap", "code"), [(not_finite, 102), (huge, 115), (biased, 115)])
def test_weights_that_no_training_led_to(hospital: Hospital, trap: Any, code: int, number: int) -> None:
    answer = hospital.ask("train", number, trap(first(hospital)))
    hospital.refuses(answer, code, "not finite" if code == 102 else "first theta")
    assert thetas_of(hospital.folder, hospital.study.digest) == {}


def test_a_first_theta_of_the_coordinator_s_own(hospital: Hospital) -> None:
    for by in (1e-4, -0.05):
        hospital.refuses(hospital.ask("train", 1, moved(first(hospital), by)), ThetaError.code, "first theta")
    assert hospital.ask("train", 1).has_content()


def test_a_jump_from_one_round_to_the_next(hospital: Hospital) -> None:
    theta = first(hospital)
    hospital.ask("join")
    for number in (1, 2, 3):
        assert hospital.ask("train", number, theta).has_content()
    jump = moved(theta, 2.5 * RATE)  # three steps from the first theta would lead there, one from the last does not
    hospital.refuses(hospital.ask("train", 4, jump), ThetaError.code, "that of round 3")
    assert hospital.ask("train", 6, jump).has_content()  # two rounds were missed: three steps


def test_a_trap_to_evaluate(hospital: Hospital) -> None:
    hospital.refuses(hospital.ask("evaluate", 3, biased(first(hospital))), ThetaError.code, "first theta")


@pytest.mark.parametrize("wrong", ["shorter", "longer", "float64"])
def test_a_theta_of_another_form(hospital: Hospital, wrong: str) -> None:
    theta = first(hospital)
    other: Any = {"shorter": theta[:-1], "longer": np.append(theta, theta[:1]), "float64": theta.astype(float)}[wrong]
    content = pack_instruction(instruct(hospital.study, "train")[0], other)
    answer = hospital.ask("train", change=lambda packed: packed.update({"theta": content["theta"]}))
    hospital.refuses(answer, ContractError.code, "not a vector")


# Rounds that come again.


def test_a_round_with_another_theta_or_out_of_order(hospital: Hospital) -> None:
    theta = first(hospital)
    hospital.ask("join")
    for number in (1, 3):
        assert hospital.ask("train", number, theta).has_content()
    hospital.refuses(hospital.ask("train", 3, moved(theta, 1e-3)), ContractError.code, "with another theta")
    hospital.refuses(hospital.ask("train", 2, theta), ContractError.code, "after round 3")
    assert hospital.ask("train", 1, theta).has_content()  # the same question again
    # A run that goes on from a checkpoint asks to join before.
    assert hospital.ask("join").has_content()
    assert hospital.ask("train", 2, moved(theta, 1e-3)).has_content()


@guaranteed
def test_a_round_that_was_spent_is_not_answered_for_another_theta_whatever_comes_before(hospital: Hospital) -> None:
    theta = first(hospital)
    sent = []
    for _ in range(2):
        assert hospital.ask("join").has_content()
        sent.append([hospital.ask("train", number, theta).content for number in (1, 2)])
    vectors = [[c.array_records["meta_gradient"]["meta_gradient"].data for c in contents] for contents in sent]
    assert vectors[0] == vectors[1]
    hospital.ask("join")
    hospital.refuses(hospital.ask("train", 2, moved(theta, 1e-3)), ContractError.code, "answered for another theta")
    assert hospital.spent() == 2


@guaranteed
def test_a_jump_is_refused_also_after_joining_where_a_study_runs_once(hospital: Hospital) -> None:
    theta = first(hospital)
    hospital.ask("join")
    assert hospital.ask("train", 12, theta).has_content()
    hospital.ask("join")
    # A coordinator that went back five rounds could be 11 or 12 steps away, and not 15.
    hospital.refuses(hospital.ask("train", 17, moved(theta, 15.9 * RATE)), ThetaError.code, "that of round 12")
    assert hospital.ask("train", 17, moved(theta, 14 * RATE)).has_content()


@pytest.mark.parametrize("number", [-1, 0, ROUNDS + 1, 10**9])
def test_a_round_that_the_study_has_not(hospital: Hospital, number: int) -> None:
    for kind in ("train", "evaluate"):
        if (kind, number) != ("evaluate", 0):
            hospital.refuses(hospital.ask(kind, number), ContractError.code, "")


# Messages that are not what they say.


@guaranteed
@pytest.mark.parametrize("kind", ["join", "train", "evaluate"])
def test_an_instruction_under_another_type_is_refused_before_it_is_spent(hospital: Hospital, kind: str) -> None:
    for message_type in {"query.join", "train", "evaluate"} - {"query.join" if kind == "join" else kind}:
        hospital.refuses(hospital.ask(kind, message_type=message_type), ContractError.code, "its message to")
    assert hospital.spent() == 0


@pytest.mark.parametrize(
    "record", [{"sites": "hospital-0"}, {"quorum": 1}, {"noise": 0.0}, {"seed": 7}], ids=lambda r: next(iter(r))
)
def test_a_roster_or_numbers_of_the_coordinator_s_own(hospital: Hospital, record: dict[str, Any]) -> None:
    beside = hospital.ask("train", change=lambda content: content.update({"roster": ConfigRecord(record)}))
    hospital.refuses(beside, ContractError.code, "holds exactly")

    def within(content: RecordDict) -> None:
        content["instruction"] = ConfigRecord({**content.config_records["instruction"], **record})

    hospital.refuses(hospital.ask("train", change=within), ContractError.code, "no instruction")


@guaranteed
def test_figures_that_the_study_withholds(hospital: Hospital) -> None:
    hospital.refuses(hospital.ask("evaluate", 3), ContractError.code, "withheld")


# A different theta for one of the sites: not refused, and found out by comparing.


def test_sites_find_out_that_they_were_shown_different_thetas(hospital: Hospital, tmp_path: Path) -> None:
    theta = first(hospital)
    for index, by in enumerate((0.0, 0.0, RATE)):
        site = Hospital(hospital.study, hospital.folder, hospital.spy, {"partition-id": index})
        site.ask("join")
        for number in (1, 2):
            assert site.ask("train", number, moved(theta, by * (number - 1))).has_content()

    def thetas(index: int, *others: str) -> tuple[int, str, str]:
        folder = virtual_site(hospital.study, index)
        arguments = ["thetas", hospital.study.digest[:12], "--site", str(folder)]
        result = CliRunner().invoke(commands, [*arguments, *(p for other in others for p in ("--compare", other))])
        return result.exit_code, result.stdout, " ".join(result.stderr.split())

    shown = [thetas(index) for index in range(3)]
    assert [code for code, _, _ in shown] == [0, 0, 0]
    for index, (_, out, _) in enumerate(shown):
        (tmp_path / f"{index}.txt").write_text(out)
    assert thetas(0, str(tmp_path / "1.txt"))[0] == 0
    code, _, err = thetas(0, str(tmp_path / "1.txt"), str(tmp_path / "2.txt"))
    assert code == 1
    assert f"{tmp_path}/2.txt: 2" in err
    assert "1.txt" not in err
    (tmp_path / "2.txt").write_text("study " + "0" * 64)
    assert thetas(0, str(tmp_path / "2.txt"))[0] == 1


def test_nothing_of_a_message_says_who_else_takes_part() -> None:
    """What a roster would protect is not there: secure aggregation. A coordinator that lies about one gains nothing."""
    assert set(vars(Instruction("train", "s"))) == {"kind", "study", "round", "attempt", "theta", "scratch", "side"}

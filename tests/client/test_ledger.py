"""The ledger: whatever is killed, what was spent is never less than what was sent; and one budget holds for all."""

import os
import random
import resource
import signal
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import pytest

from client.ledger import KEPT, Limit, Question, Spent, open_ledger
from common.errors import BudgetError, ContractError, StorageError
from common.privacy import accounting
from common.privacy.accounting import Rounds, epsilon

WHOLE = Rounds(1.0, 8.0, 100)


def question(number: int = 1, study: str = "a" * 64, theta: str = "t", whole: Rounds = WHOLE) -> Question:
    return Question(study, number, theta, whole)


def never() -> bytes:
    raise AssertionError("it was made again")


def test_a_round_is_made_and_spent_once(tmp_path: Path) -> None:
    for _ in range(2):
        with open_ledger(tmp_path) as ledger:
            first = ledger.once(question(), lambda: b"noise")
            assert ledger.once(question(), never) == first == b"noise"
            assert ledger.spent() == [Spent("a" * 64, Rounds(1.0, 8.0, 1))]


def test_a_round_that_was_reserved_and_never_stored_is_spent_and_made_again_once(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        with pytest.raises(RuntimeError, match="died"):
            ledger.once(question(), lambda: (_ for _ in ()).throw(RuntimeError("died")))
        assert ledger.spent()[0].rounds.count == 1
        assert ledger.once(question(), lambda: b"second") == b"second"
        assert ledger.once(question(), never) == b"second"
        assert ledger.spent()[0].rounds.count == 1


def test_of_two_that_make_the_same_round_the_first_is_sent_by_both(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as one, open_ledger(tmp_path) as other:
        assert one.reserve(question()) is None
        assert other.once(question(), lambda: b"other") == b"other"
        assert one.keep(question(), b"one") == b"other"
        assert one.spent()[0].rounds.count == 1


def test_a_round_is_answered_for_one_theta(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.once(question(), lambda: b"noise")
        with pytest.raises(ContractError, match="another theta"):
            ledger.once(question(theta="u"), never)
        assert ledger.spent()[0].rounds.count == 1


def test_old_rounds_are_dropped_and_stay_spent(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        for number in range(1, 10):
            ledger.once(question(number), lambda number=number: bytes([number]))  # type: ignore[misc]
        for number in range(10 - KEPT, 10):
            assert ledger.once(question(number), never) == bytes([number])
        for number in range(1, 10 - KEPT):
            with pytest.raises(BudgetError, match="a study runs once"):
                ledger.once(question(number), never)
        assert ledger.spent()[0].rounds.count == 9


def test_one_budget_holds_for_all_studies(tmp_path: Path) -> None:
    """Counted by hand: rounds until the closed form is above the budget, whichever study they belong to."""
    limit = Limit(1.0, 1e-5)
    allowed = max(n for n in range(200) if epsilon([Rounds(1.0, 8.0, n)], 1e-5) <= 1.0)
    studies = ["a" * 64, "b" * 64]
    with open_ledger(tmp_path) as ledger:
        ledger.set_limit(limit)
        for number in range(allowed):
            ledger.once(question(number // 2 + 1, studies[number % 2]), lambda: b"x")
        for study in [*studies, "c" * 64]:
            with pytest.raises(BudgetError, match="epsilon 1 at delta 1e-05, does not allow another round"):
                ledger.once(question(90, study), never)
        assert sum(part.rounds.count for part in ledger.spent()) == allowed
        # What was sent may be sent again, with an empty purse too.
        last = allowed - 1
        assert ledger.once(question(last // 2 + 1, studies[last % 2]), never) == b"x"
        ledger.set_limit(Limit(2.0, 1e-5))
        ledger.once(question(90), lambda: b"x")


def test_a_study_that_fits_is_asked_about_once(tmp_path: Path) -> None:
    whole = Rounds(0.05, 1.1, 100)
    with open_ledger(tmp_path) as ledger:
        ledger.set_limit(Limit(2.9, 1e-5))
        ledger.once(question(1, whole=whole), lambda: b"x")
        computed = accounting._epsilon.cache_info().misses
        for number in range(2, 40):
            ledger.once(question(number, whole=whole), lambda: b"x")
        assert accounting._epsilon.cache_info().misses == computed
        with pytest.raises(BudgetError):
            ledger.once(question(1, "b" * 64, whole=Rounds(1.0, 0.3, 1)), never)


def test_a_study_without_a_guarantee_and_a_budget_exclude_each_other(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.unprotected("a" * 64)
        ledger.unprotected("a" * 64)
        assert ledger.without_guarantee() == ["a" * 64]
        ledger.set_limit(Limit(3.0, 1e-5))
        with pytest.raises(BudgetError, match="gives no guarantee"):
            ledger.unprotected("b" * 64)
        ledger.set_limit(Limit(float("inf"), 1e-5))
        ledger.unprotected("b" * 64)
        assert ledger.without_guarantee() == ["a" * 64, "b" * 64]


@pytest.mark.parametrize("damage", ["rubbish", "folder", "full", "version"])
def test_where_the_ledger_cannot_be_written_nothing_is_made(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.sqlite"
    if damage == "rubbish":
        path.write_bytes(b"not a database" * 100)
    elif damage == "folder":
        path.mkdir()
    else:
        with open_ledger(tmp_path) as ledger:
            ledger.once(question(), lambda: b"x")
        with sqlite3.connect(path) as database:
            if damage == "version":
                database.execute("PRAGMA user_version = 7")
            else:
                database.execute(
                    "CREATE TRIGGER full BEFORE INSERT ON release BEGIN SELECT RAISE(ABORT, 'disk full'); END"
                )
    with pytest.raises(StorageError), open_ledger(tmp_path) as ledger:
        ledger.once(question(2), never)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_on_a_disk_that_is_really_full_nothing_leaves_that_was_not_spent(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.once(question(), lambda: b"x")
    size = (tmp_path / "ledger.sqlite").stat().st_size
    read, wire = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            for number in range(2, 250):
                site_process(tmp_path, wire, number)
        except StorageError:
            os._exit(7)
        os._exit(1)
    os.close(wire)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with os.fdopen(read, "rb") as pipe:
        sent = pipe.read()
    with open_ledger(tmp_path) as ledger:  # there is room again
        assert len(sent) // 9 + 1 <= ledger.spent()[0].rounds.count <= len(sent) // 9 + 2
        ledger.once(question(250), lambda: b"x")


def site_process(folder: Path, wire: int, number: int) -> None:
    """Answer a round as the client does: spend, make, store, send; each answer of its own."""
    with open_ledger(folder) as ledger:
        sent = ledger.once(question(number), lambda: os.urandom(8))
    os.write(wire, number.to_bytes(1, "big") + sent)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_any_moment_it_has_spent_what_was_sent(tmp_path: Path) -> None:
    """Kill -9, 100 times: no round has two answers, and every answer was paid for."""
    read, wire = os.pipe()
    os.set_blocking(read, False)
    killed, asked, generator = 0, 0, random.Random(3)
    began = time.monotonic()
    site_process(tmp_path, wire, 1)
    window = max(0.01, 2 * (time.monotonic() - began))
    while killed < 100:
        number = killed + generator.randint(1, 4)  # some anew, some again
        asked = max(asked, number)
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                site_process(tmp_path, wire, number)
            os._exit(0)
        time.sleep(generator.uniform(0, window))
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        died = os.WIFSIGNALED(status)
        killed += died
        window *= 1.05 if died else 0.7  # however fast the disk is, about one in eight comes to its end
    messages = set()
    with suppress(BlockingIOError):
        while message := os.read(read, 9):
            messages.add((message[0], message[1:]))
    os.close(read)
    os.close(wire)
    with open_ledger(tmp_path) as ledger:
        spent = ledger.spent()[0].rounds
        rounds = {number for number, _ in messages}
        assert len(messages) == len(rounds)  # one answer a round, however often it was sent
        assert spent.count >= len(rounds)
        assert epsilon([spent], 1e-5) >= epsilon([Rounds(1.0, 8.0, len(messages))], 1e-5)
        assert len(rounds) > 5
        assert spent.count > len(rounds)  # some died after they had paid
        for number, sent in messages:
            if number > asked - KEPT:  # one that died may have been paid for, and kept
                assert ledger.once(question(number), never) == sent

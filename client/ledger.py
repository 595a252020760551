"""What this site's patients have spent: every private release, written down before data are read.

One file a site, so one budget for its patients over all studies. A round that is reserved counts as spent, whatever
becomes of it. What is to be sent is stored before it is sent, and a round that is asked for again gets the same bytes.
Where the ledger cannot be written, nothing is released.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

from common.errors import BudgetError, ContractError, StorageError
from common.privacy.accounting import Rounds, epsilon

__all__ = ["KEPT", "Ledger", "Limit", "Question", "Spent", "open_ledger"]

#: Rounds of a study whose bytes are kept: more than a coordinator goes back, even from its oldest checkpoint.
KEPT = 5

_VERSION = 1
_SCHEMA = (
    "CREATE TABLE release (study TEXT NOT NULL, round INTEGER NOT NULL, theta TEXT NOT NULL, sampling REAL NOT NULL, "
    "noise REAL NOT NULL, at REAL NOT NULL, state TEXT NOT NULL CHECK (state IN ('reserved', 'kept', 'dropped')), "
    "sent BLOB, PRIMARY KEY (study, round)) STRICT",
    "CREATE TABLE unprotected (study TEXT PRIMARY KEY, at REAL NOT NULL) STRICT",
    "CREATE TABLE budget (at REAL NOT NULL, epsilon REAL NOT NULL, delta REAL NOT NULL) STRICT",
    f"PRAGMA user_version = {_VERSION}",
)


@dataclass(frozen=True)
class Question:
    """A round of a study, as its release is named, and what the whole study would cost."""

    study: str
    round: int
    theta: str
    whole: Rounds


@dataclass(frozen=True)
class Limit:
    """The most that a patient may spend: epsilon at a delta, patients added or removed."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Spent:
    """What a study has spent."""

    study: str
    rounds: Rounds


@contextmanager
def open_ledger(site: Path) -> Iterator["Ledger"]:
    """Open a site's ledger, a new one where there is none: its tables are made with its first line.

    Raises
    ------
    StorageError
        It cannot be read or written, or is of another version.
    """
    try:
        with closing(sqlite3.connect(site / "ledger.sqlite", timeout=60, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = EXTRA")  # what is committed survives a power cut too
            yield Ledger(database)
    except sqlite3.Error as error:
        raise StorageError(
            f"the ledger cannot be read or written, so nothing is sent ({type(error).__name__}): is there space, and "
            "are its permissions right? If it is damaged, restore it from a backup"
        ) from None


class Ledger:
    """Statements on an open ledger; each is one transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._run = database.execute
        self._database = database

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make everything inside happen, or nothing. Inside another one, it is a part of that."""
        if self._database.in_transaction:
            yield
            return
        self._run("BEGIN IMMEDIATE")
        try:
            self._prepare()
            yield
        except BaseException:
            if self._database.in_transaction:
                self._run("ROLLBACK")
            raise
        self._run("COMMIT")

    def once(self, question: Question, make: Callable[[], bytes]) -> bytes:
        """Return what is sent for a round: made and spent the first time, the same bytes ever after.

        Raises
        ------
        BudgetError
            The budget does not allow it, or the round's bytes are kept no longer.
        ContractError
            The round was answered for another theta.
        """
        sent = self.reserve(question)
        return self.keep(question, make()) if sent is None else sent

    def reserve(self, question: Question) -> bytes | None:
        """Spend a round, or return the bytes that it was answered with.

        One that was reserved and whose bytes were never stored was never sent: it is made again, and spent once.
        """
        with self.transaction():
            row = self._row(question)
            if row is None:
                self._check(question)
                whole = question.whole
                self._run(
                    "INSERT INTO release VALUES (?, ?, ?, ?, ?, ?, 'reserved', NULL)",
                    (question.study, question.round, question.theta, whole.sampling, whole.noise, time.time()),
                )
                return None
        return self._same(question, row)

    def answered(self, question: Question) -> bytes | None:
        """Return the bytes that a round was answered with; None where it was not. Nothing is spent.

        Raises
        ------
        BudgetError, ContractError
            As of `once`.
        """
        with self.transaction():
            row = self._row(question)
        return None if row is None else self._same(question, row)

    def _row(self, question: Question) -> tuple[str, str, bytes | None] | None:
        found: tuple[str, str, bytes | None] | None = self._run(
            "SELECT theta, state, sent FROM release WHERE study = ? AND round = ?", (question.study, question.round)
        ).fetchone()
        return found

    @staticmethod
    def _same(question: Question, row: tuple[str, str, bytes | None]) -> bytes | None:
        theta, state, sent = row
        if theta != question.theta:
            raise ContractError(f"round {question.round} was answered for another theta: it is answered once", "replay")
        if state == "dropped":
            raise BudgetError(
                f"round {question.round} was answered before, and its answer is kept for {KEPT} rounds only: a study "
                "runs once. To run it anew, change its seed: it is another study then, and spends anew"
            )
        return sent

    def keep(self, question: Question, made: bytes) -> bytes:
        """Store what a reserved round is answered with, and return it, or what another process was first with."""
        key = (question.study, question.round)
        with self.transaction():
            self._run(
                "UPDATE release SET state = 'kept', sent = ? WHERE study = ? AND round = ? AND state = 'reserved'",
                (made, *key),
            )
            (sent,) = self._run("SELECT sent FROM release WHERE study = ? AND round = ?", key).fetchone()
            self._run(
                "UPDATE release SET state = 'dropped', sent = NULL WHERE study = ? AND round <= ? AND state = 'kept'",
                (question.study, question.round - KEPT),
            )
        if sent is None:
            raise BudgetError(f"round {question.round} is over at this site")
        return bytes(sent)

    def unprotected(self, study: str) -> None:
        """Write down that a study has releases without a guarantee.

        Raises
        ------
        BudgetError
            This site has a budget, which would mean nothing.
        """
        with self.transaction():
            if isfinite(self.limit().epsilon):
                raise BudgetError(
                    "this site's patients have a privacy budget, and the study gives no guarantee: refuse the study, "
                    "or lift the budget with `wardround-site budget --epsilon inf`"
                )
            self._run("INSERT OR IGNORE INTO unprotected VALUES (?, ?)", (study, time.time()))

    def limit(self) -> Limit:
        """Return the budget; infinite where none was ever set."""
        with self.transaction():
            row = self._run("SELECT epsilon, delta FROM budget ORDER BY rowid DESC LIMIT 1").fetchone()
        return Limit(*row) if row else Limit(inf, 1e-5)

    def set_limit(self, limit: Limit) -> None:
        """Change the budget; earlier ones stay written."""
        with self.transaction():
            self._run("INSERT INTO budget VALUES (?, ?, ?)", (time.time(), limit.epsilon, limit.delta))

    def spent(self) -> list[Spent]:
        """Return what every study has spent, in the order in which they began."""
        with self.transaction():
            rows = self._run(
                "SELECT study, sampling, noise, count(*) FROM release GROUP BY study, sampling, noise ORDER BY min(at)"
            ).fetchall()
        return [Spent(study, Rounds(*rounds)) for study, *rounds in rows]

    def without_guarantee(self) -> list[str]:
        """Return the studies that had releases without one."""
        with self.transaction():
            return [study for (study,) in self._run("SELECT study FROM unprotected ORDER BY at")]

    def _prepare(self) -> None:
        """Make the tables of a new ledger, within the transaction that needs them: the disk is waited for once."""
        (version,) = self._run("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _SCHEMA:
                self._run(statement)
        elif version != _VERSION:
            raise StorageError(f"the ledger has version {version}, this program reads {_VERSION}: update it")

    def _check(self, question: Question) -> None:
        limit, whole = self.limit(), question.whole
        if not isfinite(limit.epsilon):
            return
        spent = self.spent()
        others = [part.rounds for part in spent if part.study != question.study]
        # Where the whole study fits, and it mostly does, this is computed once for all its rounds.
        if epsilon([*others, whole], limit.delta) <= limit.epsilon:
            return
        own = sum(part.rounds.count for part in spent if part.study == question.study)
        if epsilon([*others, Rounds(whole.sampling, whole.noise, own + 1)], limit.delta) > limit.epsilon:
            raise BudgetError(
                f"the privacy budget of this site's patients, epsilon {limit.epsilon:g} at delta {limit.delta:g}, does "
                "not allow another round: see `wardround-site budget`"
            )

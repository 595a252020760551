"""What became of patients later, and which of their images came early enough to predict it."""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

from common.errors import DataError

__all__ = ["OUTCOMES", "Outcomes", "day", "horizon", "read_outcomes"]

#: The classes that outcomes make, in the order of the head: the risk is the probability of the second.
OUTCOMES = ("no outcome", "outcome")

_MEANINGS = {"0": OUTCOMES[0], "no": OUTCOMES[0], "1": OUTCOMES[1], "yes": OUTCOMES[1]}
_DAY = re.compile(r"(\d{4})-(\d{2})-(\d{2})|(\d{4})(\d{2})(\d{2})", re.ASCII)
#: A horizon of a hundred years is none.
_MOST_DAYS = 36_525


@dataclass(frozen=True)
class Outcomes:
    """What became of patients, and how long before it an image must have been taken.

    Attributes
    ----------
    of : mapping
        By patient, as the site's own files name them: the day on which the outcome showed, or the last on which it was
        known not to have; and which of `OUTCOMES`. It is held in memory while labels are read, and kept nowhere.
    horizon : timedelta
        An image counts if it was taken at least so long before that day.
    """

    of: Mapping[str, tuple[date, str]] = field(repr=False)
    horizon: timedelta

    def label(self, patient: str, taken: date) -> str | None:
        """Return the label of an image: ``""`` of a patient without outcome, None of one after the horizon."""
        if patient not in self.of:
            return ""
        known, label = self.of[patient]
        return label if taken <= known - self.horizon else None


def horizon(text: str) -> timedelta:
    """Return a horizon of whole days, written as ``365d``.

    Raises
    ------
    DataError
        It is something else.
    """
    found = re.fullmatch(r"(\d{1,6})d", text, re.ASCII)
    if not found or not 1 <= int(found[1]) <= _MOST_DAYS:
        raise DataError("--horizon is a number of days from 1 to 36525, as in 365d")
    return timedelta(days=int(found[1]))


def day(text: str) -> date | None:
    """Return a day written as ``2024-01-31`` or, as in DICOM, ``20240131``; None where it is something else."""
    found = _DAY.fullmatch(text)
    if not found:
        return None
    try:
        return date(*(int(part) for part in found.groups() if part))
    except ValueError:
        return None


def read_outcomes(path: Path, least: timedelta) -> Outcomes:
    """Read a CSV file with the columns ``patient``, ``date`` and ``outcome`` (yes, no, 1 or 0), one row a patient.

    A row without outcome is a patient of whom nothing is known. The text of an error names lines, never a value.

    Raises
    ------
    DataError
        The file cannot be read, lacks a column, or a line of it does not say what it must.
    """
    found: dict[str, tuple[date, str]] = {}
    for line, who, when, what in _rows(path):
        if not what:
            continue
        known, label = day(when), _MEANINGS.get(what.lower())
        if known is None:
            raise DataError(f"the date in line {line} of the outcome file is none: write 2024-01-31 or 20240131")
        if known < date.min + least:
            raise DataError(f"the date in line {line} of the outcome file is too early for this horizon")
        if label is None:
            raise DataError(f"the outcome in line {line} of the outcome file is not yes, no, 1 or 0")
        if not who:
            raise DataError(f"line {line} of the outcome file names no patient")
        if who in found:
            raise DataError(f"line {line} of the outcome file gives a patient a second outcome: keep the first to show")
        found[who] = known, label
    return Outcomes(found, least)


def _rows(path: Path) -> Iterator[tuple[int, str, str, str]]:
    columns = ("patient", "date", "outcome")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            if any(header.count(name) != 1 for name in columns):
                raise DataError("the outcome file needs one column each of: patient, date, outcome")
            for row in rows:
                if len(row) != len(header):
                    raise DataError(f"line {rows.line_num} of the outcome file has {len(row)} cells, not {len(header)}")
                who, when, what = (row[header.index(name)].strip() for name in columns)
                yield rows.line_num, who, when, what
    except OSError:
        raise DataError("the outcome file cannot be opened: check its path and permissions") from None
    except UnicodeDecodeError:
        raise DataError("the outcome file is not text in UTF-8: save it so and try again") from None
    except csv.Error:
        raise DataError("the outcome file is not CSV: an open quotation mark, perhaps") from None

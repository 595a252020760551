"""Labels from a CSV file, joined to pictures by keyed hashes; the file's own text is not kept."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from client.data.catalogue import COLUMNS, Catalogue
from client.data.keys import keyed
from client.data.outcome import Outcomes, day
from client.data.picture import IDENTIFIERS
from common.errors import DataError

__all__ = ["DatedRow", "LabelReport", "Labels", "check_labels", "dated_rows", "import_labels", "label_report"]

#: Which column a row is joined on, where it has several: the most specific one.
_MOST_SPECIFIC_FIRST = (
    "SOPInstanceUID",
    "path",
    "SeriesInstanceUID",
    "AccessionNumber",
    "StudyInstanceUID",
    "PatientID",
)

#: Labels stand in clear in the catalogue, in reports and in a study: they name diseases, not people.
_LONGEST_LABEL = 64


@dataclass(frozen=True)
class Labels:
    """A labels file.

    Attributes
    ----------
    path : Path
        CSV in UTF-8 with a header line.
    columns : mapping
        From the file's own column names to ``label``, ``patient`` (what keeps pictures together that name no patient
        themselves: lesion, smear) or one of `client.data.picture.IDENTIFIERS`. Columns of these names need no entry.
    outcomes : Outcomes or None
        What became of the patients later: it is the label, whatever a column ``label`` says, and the file has a column
        ``date`` instead, the day on which an image was taken. Dates are looked at and kept nowhere.
    """

    path: Path
    columns: Mapping[str, str]
    outcomes: Outcomes | None = None


@dataclass(frozen=True)
class DatedRow:
    """A row of a labels file with dates.

    Attributes
    ----------
    kind, value, patient : str
        What it is joined on, and who it is.
    taken : date
        When the image was.
    label : str or None
        ``""`` of a patient without outcome, None of an image after the horizon.
    """

    kind: str
    value: str
    patient: str
    taken: date
    label: str | None


@dataclass(frozen=True)
class LabelReport:
    """What became of the rows of a labels file.

    Attributes
    ----------
    rows : int
        Rows that were used; ``repeated`` more say the same again.
    unmatched : int
        Rows that match no picture.
    """

    rows: int
    repeated: int
    unmatched: int


def check_labels(labels: Labels) -> None:
    """Raise what `import_labels` would raise: before hours of reading, not after them."""
    for _ in _rows(labels):
        pass


def import_labels(catalogue: Catalogue, key: bytes, labels: Labels) -> None:
    """Replace the site's labels by those of a file.

    Raises
    ------
    DataError
        The file cannot be read or lacks a column. The text names columns and line numbers, never a value.
    """
    catalogue.database.execute("DELETE FROM label")
    for kind, value, label, patient in _rows(labels):
        who = keyed(key, "PatientID", patient) if patient else None
        catalogue.database.execute(
            # An empty patient stands for several: rows that agree but for the patient do not say whose the picture is.
            "INSERT INTO label (kind, value, label, patient) VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET repeats = repeats + 1, patient = CASE "
            "WHEN excluded.patient IS NULL THEN patient "
            "WHEN patient IS NULL OR patient = excluded.patient THEN excluded.patient ELSE x'' END",
            (kind, keyed(key, kind, value), label, who),
        )


def label_report(catalogue: Catalogue) -> LabelReport:
    """Return what became of the rows of the labels file."""
    rows, repeated = catalogue.database.execute("SELECT count(*), coalesce(sum(repeats), 0) FROM label").fetchone()
    unmatched = sum(
        catalogue.database.execute(
            "SELECT count(*) FROM label WHERE kind = ? AND NOT EXISTS "
            f"(SELECT 1 FROM image WHERE image.{column} = label.value)",
            (kind,),
        ).fetchone()[0]
        for kind, column in COLUMNS.items()
    )
    return LabelReport(int(rows), int(repeated), int(unmatched))


def dated_rows(labels: Labels, outcomes: Outcomes) -> Iterator[DatedRow]:
    """Yield the rows of a labels file with dates, also those that do not count.

    An image after the horizon must not come back by another row: rows that could be of one image, because they are
    joined on the same value or on different columns, have one date or are refused.
    """
    seen: dict[str, date] = {}
    joined = ""
    for line, kind, cells in _cells(labels, "date"):
        who, taken = cells.get("patient") or cells.get("PatientID", ""), day(cells["date"])
        if kind is None or kind == "PatientID":
            raise DataError(f"line {line} of the labels file must name what was taken on its date, not a patient alone")
        if joined not in ("", kind):
            raise DataError(f"line {line} of the labels file is joined on {kind}, others on {joined}: use one of them")
        if not who:
            raise DataError(f"line {line} of the labels file names no patient: it is how an outcome is found")
        if taken is None:
            raise DataError(f"the date in line {line} of the labels file is none: write 2024-01-31 or 20240131")
        if seen.setdefault(cells[kind], taken) != taken:
            raise DataError(f"line {line} of the labels file gives a second date to what an earlier line names")
        joined = kind
        yield DatedRow(kind, cells[kind], who, taken, outcomes.label(who, taken))


def _rows(labels: Labels) -> Iterator[tuple[str, str, str, str]]:
    """Yield what a row is joined on, its value, the label, and the patient or ``""``."""
    if labels.outcomes is not None:
        for row in dated_rows(labels, labels.outcomes):
            if row.label:
                yield row.kind, row.value, row.label, row.patient
        return
    for line, kind, cells in _cells(labels, "label"):
        label = cells["label"]
        if not label:
            continue
        if kind is None:
            raise DataError(f"line {line} of the labels file has a label and nothing to join it on")
        if len(label) > _LONGEST_LABEL or not label.isprintable():
            raise DataError(f"the label in line {line} is over {_LONGEST_LABEL} characters or not text")
        yield kind, cells[kind], label, cells.get("patient", "")


def _cells(labels: Labels, needed: str) -> Iterator[tuple[int, str | None, dict[str, str]]]:
    """Yield every row's line, the most specific column that it can be joined on, and its cells by our names."""
    known = (*IDENTIFIERS, needed, "patient")
    if unknown := set(labels.columns.values()) - set(known):
        raise DataError(
            f"--map names {sorted(unknown)}: a column can be {needed}, patient or one of {', '.join(IDENTIFIERS)}"
        )
    try:
        with labels.path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            if missing := set(labels.columns) - set(header):
                raise DataError(f"the labels file has no column {sorted(missing)}, which --map names")
            names = [labels.columns.get(name, name) for name in header]
            at = {name: names.index(name) for name in known if name in names}
            if twice := sorted(name for name in at if names.count(name) > 1):
                raise DataError(f"several columns of the labels file are {twice}: use --map for one of them")
            if needed not in at or not at.keys() & set(IDENTIFIERS):
                raise DataError(
                    f"the labels file needs a column `{needed}` and one of "
                    f"{', '.join(IDENTIFIERS)}: rename columns, or say --map 'their name=our name'"
                )
            for row in rows:
                if len(row) != len(header):
                    raise DataError(f"line {rows.line_num} of the labels file has {len(row)} cells, not {len(header)}")
                cells = {name: row[place].strip() for name, place in at.items()}
                yield rows.line_num, next((kind for kind in _MOST_SPECIFIC_FIRST if cells.get(kind)), None), cells
    except OSError:
        raise DataError("the labels file cannot be opened: check its path and permissions") from None
    except UnicodeDecodeError:
        raise DataError("the labels file is not text in UTF-8: save it so and try again") from None
    except csv.Error:
        raise DataError("the labels file is not CSV: an open quotation mark, perhaps") from None

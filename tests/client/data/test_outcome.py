"""Outcomes and horizons: the text of either, and that no image after the horizon gets a label."""

from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from client.data.labels import Labels, check_labels, dated_rows
from client.data.outcome import OUTCOMES, Outcomes, day, horizon, read_outcomes
from common.errors import DataError

YEAR = timedelta(days=365)


@given(st.integers(1, 36_525))
def test_a_horizon_is_days(days: int) -> None:
    assert horizon(f"{days}d") == timedelta(days=days)


@given(st.text(alphabet="0123456789d -\u0661\n", max_size=8))
def test_whatever_else_stands_there_is_refused_or_days(text: str) -> None:
    if text[-1:] == "d" and text[:-1].isascii() and text[:-1].isdigit() and 0 < int(text[:-1]) <= 36_525:
        assert horizon(text).days == int(text[:-1])
    else:
        with pytest.raises(DataError, match="365d"):
            horizon(text)


@pytest.mark.parametrize("text", ["0d", "36526d", "365", "12m", "-1d", "1.5d", " 1d", "1d\n", "\u0661d", ""])
def test_horizons_that_are_none(text: str) -> None:
    with pytest.raises(DataError, match="365d"):
        horizon(text)


@given(st.dates())
def test_a_day_is_written_in_two_ways(when: date) -> None:
    assert day(when.isoformat()) == day(when.isoformat().replace("-", "")) == when


@given(st.text(alphabet="0123456789-W/ ", max_size=11))
def test_a_day_is_one_or_none(text: str) -> None:
    found = day(text)
    if found is not None:
        assert text in (found.isoformat(), found.isoformat().replace("-", ""))


@pytest.mark.parametrize("text", ["2023-02-29", "20231301", "2024-W05-1", "24-01-31", "2024-1-3", "2024-0131"])
def test_days_that_are_none(text: str) -> None:
    assert day(text) is None


@given(st.dates(min_value=date(200, 1, 1)), st.dates(), st.integers(1, 36_525))
@example(date(2024, 1, 31), date(2023, 1, 31), 365)
@example(date(2024, 1, 31), date(2023, 2, 1), 365)
def test_an_image_counts_exactly_where_the_horizon_has_not_begun(known: date, taken: date, days: int) -> None:
    outcomes = Outcomes({"A": (known, OUTCOMES[1])}, timedelta(days=days))
    counts = (known - taken).days >= days
    assert outcomes.label("A", taken) == (OUTCOMES[1] if counts else None)
    assert outcomes.label("B", taken) == ""
    assert "A" not in repr(outcomes).replace("Outcomes", "")


def outcome_file(folder: Path, *lines: str, header: str = "patient,date,outcome") -> Path:
    path = folder / "outcome.csv"
    path.write_text("\n".join([header, *lines]))
    return path


def test_an_outcome_file(tmp_path: Path) -> None:
    lines = ("SECRET1,2024-01-31,yes,x", "SECRET2, 20240201 ,0,", "SECRET3,,,", "SECRET4,2024-03-01,NO,")
    found = read_outcomes(outcome_file(tmp_path, *lines, header="patient,date,outcome,more"), YEAR)
    assert found.of == {
        "SECRET1": (date(2024, 1, 31), "outcome"),
        "SECRET2": (date(2024, 2, 1), "no outcome"),
        "SECRET4": (date(2024, 3, 1), "no outcome"),
    }


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["SECRET,2024-01-31,1", "SECRET,2024-01-31,1"], "line 3 .* second outcome"),
        (["SECRET,31.01.2024,1"], "date in line 2"),
        (["SECRET,,1"], "date in line 2"),
        (["SECRET,2024-01-31,maybe"], "outcome in line 2"),
        ([",2024-01-31,1"], "line 2 .* no patient"),
        (["SECRET,2024-01-31"], "2 cells, not 3"),
        (["SECRET,0001-01-31,1"], "too early"),
        (['"SECRET'], "not CSV"),
    ],
)
def test_lines_that_say_nothing_are_refused_without_a_value(tmp_path: Path, lines: list[str], text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        read_outcomes(outcome_file(tmp_path, *lines), YEAR)
    assert "SECRET" not in str(caught.value)
    assert "2024" not in str(caught.value).replace("2024-01-31 or 20240131", "")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        read_outcomes(tmp_path / "none.csv", YEAR)
    with pytest.raises(DataError, match="one column each"):
        read_outcomes(outcome_file(tmp_path, header="patient,outcome"), YEAR)
    (tmp_path / "latin.csv").write_bytes("patient,date,outcome\nJürgen,2024-01-31,1".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_outcomes(tmp_path / "latin.csv", YEAR)


def dated(folder: Path, *lines: str, header: str = "path,who,date") -> Labels:
    path = folder / "labels.csv"
    path.write_text("\n".join([header, *lines]))
    of = {"S1": (date(2024, 1, 31), "outcome"), "S2": (date(2024, 6, 30), "no outcome")}
    return Labels(path, {"who": "patient"}, Outcomes(of, YEAR))


def rows(labels: Labels) -> list[str | None]:
    assert labels.outcomes is not None
    return [row.label for row in dated_rows(labels, labels.outcomes)]


def test_rows_with_dates(tmp_path: Path) -> None:
    lines = ("a.png,S1,2023-01-31", "b.png,S1,2023-02-01", "c.png,S2,20230630", "d.png,S3,2001-01-01")
    assert rows(dated(tmp_path, *lines)) == ["outcome", None, "no outcome", ""]


@pytest.mark.parametrize(
    ("lines", "header", "text"),
    [
        (["a.png,S1,"], "path,who,date", "date in line 2"),
        (["a.png,,2023-01-31"], "path,who,date", "line 2 .* no patient"),
        ([",S1,2023-01-31"], "path,who,date", "line 2 .* not a patient alone"),
        (["S1,S1,2023-01-31"], "PatientID,who,date", "line 2 .* not a patient alone"),
        (["a.png,S1,2023-01-31", "a.png,S1,2024-01-31"], "path,who,date", "line 3 .* second date"),
        # A row of the whole study, and one of an image of it that came later.
        (["1,,S1,2023-01-31", "1,2,S1,2024-01-01"], "StudyInstanceUID,SOPInstanceUID,who,date", "line 3 .* use one"),
        (["a.png,S1,yes"], "path,who,label", "column `date`"),
    ],
)
def test_no_image_comes_back_by_another_row(tmp_path: Path, lines: list[str], header: str, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        check_labels(dated(tmp_path, *lines, header=header))
    assert "S1" not in str(caught.value)

"""docs/reference.md against the code: every key with its default, every code, every reason."""

import json
import re
from pathlib import Path

from client.data.picture import Reason
from common import errors
from common.errors import WardroundError
from common.study import Study

PAGE = (Path(__file__).parents[1] / "docs" / "reference.md").read_text()


def rows(title: str) -> list[list[str]]:
    """Return the cells of the tables of a section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_key_of_a_study_stands_there_with_its_default() -> None:
    told = {key.strip("`"): default.strip("`") for key, default, *_ in rows("A study's keys")[2:]}
    real = Study().run_config()
    assert list(told) == list(real)
    for key, default in told.items():
        if not default.startswith("the demo's"):
            assert json.loads(default) == real[key], key


def test_the_example_is_a_study() -> None:
    section = PAGE.split("\n## A study's keys\n")[1]
    lines = [line[4:] for line in section.split("| key |")[0].splitlines() if line.startswith("    ") or not line]
    assert Study.from_toml("\n".join(lines)).episodes.class_names == ("nevus", "melanoma")


def test_every_code_stands_there() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if re.fullmatch(r"\w+Error", name)]
    codes = {kind.code for kind in kinds if issubclass(kind, WardroundError)}
    assert [int(code) for code, *_ in rows("Codes")[2:]] == sorted(codes)


def test_every_reason_stands_there() -> None:
    assert [reason for reason, *_ in rows("Why a file is set aside")[2:]] == [str(reason) for reason in Reason]

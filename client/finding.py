"""What a check found: one line for a person, one object for a program."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["Finding", "as_dicts", "lines", "worst"]

State = Literal["ok", "warn", "fail"]
_ORDER: tuple[State, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    what : str
        A short name, the same every time.
    state : {"ok", "warn", "fail"}
        ``fail`` where the site cannot take part as it is.
    text : str
        What was found; nothing about a patient.
    remedy : str
        What to do; empty where all is well.
    """

    what: str
    state: State
    text: str
    remedy: str = ""


def worst(findings: Sequence[Finding]) -> State:
    """Return the worst state of all."""
    return max((finding.state for finding in findings), key=_ORDER.index, default="ok")


def lines(findings: Sequence[Finding]) -> list[str]:
    """Return one line for each finding."""
    width = max((len(finding.what) for finding in findings), default=0)
    return [
        f"{finding.state:<4}  {finding.what:<{width}}  {finding.text}" + (f": {finding.remedy}" * bool(finding.remedy))
        for finding in findings
    ]


def as_dicts(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Return the findings for a program."""
    return [asdict(finding) for finding in findings]

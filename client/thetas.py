"""`wardround-site thetas`: which thetas this site was shown, and whether other sites were shown the same."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from client.trail import studies_of, thetas_of
from common.console import plain_errors
from common.errors import ContractError, DataError, NotPreparedError
from common.paths import home

__all__ = ["thetas"]

Rounds = dict[int, list[str]]


@plain_errors
def thetas(
    study: Annotated[str, typer.Argument(help="The study's digest, or its beginning.")],
    compare: Annotated[
        list[Path] | None, typer.Option(help="What this command printed at another site (repeatable).")
    ] = None,
    site: Annotated[
        Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Show the digest of every theta that this site was asked to train at, by round.

    A coordinator that sends one site another theta than the others is found out by comparing: nothing in a message
    tells. Exit code 1: this site and another one have a round with no theta in common. Then the coordinator has sent
    them different ones, or it went back to a checkpoint while one of them was away.
    """
    folder = site or home() / "site"
    found = [digest for digest in studies_of(folder) if digest.startswith(study.lower())]
    if len(found) != 1:
        raise NotPreparedError(f"none, or more than one, of the studies that trained here begins with {study[:64]!r}")
    own = thetas_of(folder, found[0])
    apart: dict[str, list[int]] = {}
    for path in compare or []:
        other = _read(path, found[0])
        apart[str(path)] = [number for number in own if number in other and not {*own[number]} & {*other[number]}]
    if as_json:
        print(json.dumps({"study": found[0], "thetas": own, "apart": apart}, indent=1))
    else:
        print(f"study {found[0]}")
        for number, digests in own.items():
            print(number, *digests)
    if told := [f"{path}: {', '.join(map(str, rounds))}" for path, rounds in apart.items() if rounds]:
        raise ContractError("another theta in these rounds:\n  " + "\n  ".join(told), "other-theta")


def _read(path: Path, study: str) -> Rounds:
    """Return what another site was shown, from what it printed."""
    try:
        head, *lines = path.read_text().splitlines() or [""]
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path} cannot be read") from None
    if head != f"study {study}":
        raise DataError(f"{path} is not what `wardround-site thetas` printed for this study, without --json")
    found = [re.fullmatch(r"(\d{1,9})((?: [0-9a-f]{64})+)", line) for line in lines]
    if not all(found):
        raise DataError(f"a line of {path} is not one of `wardround-site thetas`")
    return {int(match[1]): match[2].split() for match in found if match}

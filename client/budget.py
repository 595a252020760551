"""`wardround-site budget`: what this site's patients have spent over all studies, and how much they may."""

import json
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from client.ledger import Ledger, Limit, open_ledger
from common.console import plain_errors
from common.errors import NotPreparedError
from common.paths import home
from common.privacy.accounting import epsilon
from common.privacy.statement import rounded_up

__all__ = ["budget"]


@plain_errors
def budget(
    most: Annotated[
        float | None,
        typer.Option("--epsilon", min=1e-6, help="Set the most that a patient may spend; inf lifts the budget."),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(min=1e-15, max=0.1, help="At this delta.", show_default="as before, or 1e-5")
    ] = None,
    site: Annotated[
        Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Show what this site's patients have spent, per study and in all; set how much they may.

    A round that would spend more is refused, and so is every study without a guarantee. Patients added or removed.
    """
    folder = site or home() / "site"
    if not folder.is_dir():
        raise NotPreparedError("there is no such site folder: `wardround-site index` makes one, --site names another")
    with open_ledger(folder) as ledger:
        if most is not None or delta is not None:
            before = ledger.limit()
            ledger.set_limit(Limit(before.epsilon if most is None else most, before.delta if delta is None else delta))
        facts = _facts(ledger)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    at = f"at delta {facts['delta']:g}"
    print(
        "budget    "
        + ("none: nothing is refused" if facts["budget"] is None else f"epsilon {facts['budget']:g} {at}, per patient")
    )
    print(f"spent     epsilon {rounded_up(facts['spent'])} {at}, all studies together, if a patient was in each")
    for study in facts["studies"]:
        print(
            f"  study {study['study'][:12]}: {study['rounds']} rounds, noise {study['noise']:g}, sampling rate "
            f"{study['sampling']:g}: epsilon {rounded_up(study['epsilon'])}"
        )
    for study in facts["without_guarantee"]:
        print(f"  study {study[:12]}: no formal guarantee, so what is said above is not all that patients have given")


def _facts(ledger: Ledger) -> dict[str, Any]:
    limit, spent = ledger.limit(), ledger.spent()
    return {
        "budget": limit.epsilon if isfinite(limit.epsilon) else None,
        "delta": limit.delta,
        "spent": epsilon([part.rounds for part in spent], limit.delta),
        "studies": [
            {
                "study": part.study,
                "rounds": part.rounds.count,
                "noise": part.rounds.noise,
                "sampling": part.rounds.sampling,
                "epsilon": epsilon([part.rounds], limit.delta),
            }
            for part in spent
        ],
        "without_guarantee": ledger.without_guarantee(),
    }

"""What theta gives at the sites: their figures side by side, the worst one, and the best theta so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.contract import Instruction, Side, Vector, pack_instruction
from common.errors import RoundError
from common.study import Study
from server.exchange import Exchange, Refusal
from server.roster import Roster

__all__ = ["Best", "evaluate", "with_verdict"]

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Best:
    """The best theta so far, by the validation patients of the training sites.

    Attributes
    ----------
    score : float
        Their mean accuracy after adaptation.
    round : int
        When it was.
    theta : ndarray
        ``[D]``.
    worse : int
        Evaluations since then.
    """

    score: float
    round: int
    theta: Vector
    worse: int = 0

    def after(self, score: float, number: int, theta: Vector) -> "Best":
        """Return the best one after another evaluation; of equals, the earlier."""
        if score > self.score:
            return Best(score, number, theta.copy())
        return Best(self.score, self.round, self.theta, self.worse + 1)


def evaluate(
    exchange: Exchange,
    study: Study,
    roster: Roster,
    theta: Vector,
    digest: str,
    number: int,
    side: Side,
    *,
    scratch: bool,
) -> dict[str, Any]:
    """Ask every site what adapting theta gives there.

    Parameters
    ----------
    digest : str
        Theta's.
    side : {"validation", "test"}
        The patients of a site that trains; one that never does uses all of its own.
    scratch : bool
        Ask the sites that never train, or all where there are none, for training from scratch too.

    Returns
    -------
    dict
        ``sites``: the figures that each site offers; ``out``: why a site gave none.
    """
    judges = roster.nodes(held_out=True) or roster.nodes(held_out=False)
    rest = {name: node for name, node in roster.nodes(held_out=False).items() if name not in judges}
    sites: Scores = {}
    out: dict[str, str] = {name: site.reason for name, site in roster.sites.items() if site.node is None}
    for nodes, with_scratch in ((rest, False), (judges, scratch)):
        instruction = Instruction("evaluate", study.digest, number, 1, digest, with_scratch, side)
        content = pack_instruction(instruction, theta)
        seconds = study.sites.deadline_seconds
        for outcome in exchange.ask(
            nodes, instruction, content, size=theta.size, dtype=str(theta.dtype), seconds=seconds
        ):
            if isinstance(outcome, Refusal):
                out[outcome.site] = outcome.reason
                continue
            figures = outcome.reply.scalars
            offered = {name.rpartition(".")[0] for name, v in figures.items() if name.endswith(".error") and v >= 0}
            sites[outcome.site] = {n: v for n, v in figures.items() if n.rpartition(".")[0] in offered}
    return {"round": number, "side": side, "sites": sites, "out": out}


def with_verdict(study: Study, line: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation with its worst site and the score that the best theta is chosen by.

    Raises
    ------
    RoundError
        The study wants the best theta, and no training site has validation patients.
    """
    after = {
        name: figures["known.after.mean"] for name, figures in line["sites"].items() if "known.after.mean" in figures
    }
    trained = [value for name, value in after.items() if name not in study.sites.held_out_names]
    worst = min(after, key=lambda name: after[name], default=None)
    if study.outer.patience and line["side"] == "validation" and not trained:
        raise RoundError(
            "outer.patience needs a score, and no training site gave one on validation patients: index the sites with "
            "some (in simulation: data.validation-fraction), or set outer.patience = 0"
        )
    return {
        **line,
        "score": sum(trained) / len(trained) if trained else None,
        "worst": None if worst is None else {"site": worst, "accuracy": after[worst]},
    }

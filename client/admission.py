"""What a message must be before anything of the site's data is opened: a coordinator's tricks end here."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import RecordDict

from client.gateway.approvals import study_must_be_approved
from client.ledger import KEPT, open_ledger
from client.release import question
from client.session import first_theta
from client.trail import Seen, last_seen, thetas_of
from common.contract import Instruction, Kind, Vector, check_instruction, theta_digest
from common.errors import ContractError, ThetaError
from common.meta import flatten, unflatten
from common.models.network import Theta
from common.reach import reach_of
from common.study import Study

__all__ = ["Asked", "admit"]


@dataclass(frozen=True)
class Asked:
    """A message that may be answered: its instruction, and theta as a vector ``[D]`` and by tensor name."""

    instruction: Instruction
    vector: Vector
    theta: Theta


def admit(kind: Kind, content: RecordDict, study: Study, folder: Path, node_config: Mapping[str, object]) -> Asked:
    """Check a message.

    Parameters
    ----------
    kind : {"join", "train", "evaluate"}
        What Flower's message type asks for.
    content : RecordDict
        The message's.
    study : Study
        The run's.
    folder : Path
        The site's: its ledger and its list of thetas are looked at, nothing else is.
    node_config : mapping
        ``approvals``, where it is given, is the folder in which this site's gateway keeps what was approved.

    Raises
    ------
    ApprovalError
        The site has not approved the study.
    ContractError
        The message is not one that the study sends, or the round was answered for another theta.
    ThetaError
        Theta is not one that the study can have led to.
    BudgetError
        The round's answer is kept no longer.
    """
    if "approvals" in node_config:
        study_must_be_approved(Path(str(node_config["approvals"])), study, datetime.now(UTC))
    layout, start = _start(study)
    instruction, vector = check_instruction(content, study=study.digest, size=start.size, dtype=str(start.dtype))
    if instruction.kind != kind:
        raise ContractError(f"the instruction asks to {instruction.kind}, and its message to {kind}")
    if vector is None:
        return Asked(instruction, start, layout)
    if theta_digest(vector, {name: tuple(t.shape) for name, t in layout.items()}) != instruction.theta:
        raise ContractError("theta is not the one that the instruction names")
    rounds = study.study.rounds
    if not (kind == "train") <= instruction.round <= rounds:
        raise ContractError(f"the study has {rounds} rounds, and this is not one of them")
    if kind == "evaluate" and study.privacy.figures == "withheld":
        raise ContractError("privacy.figures is 'withheld' in the study: no site evaluates")
    steps = instruction.round - (kind == "train")
    if not reach_of(study).within(vector, steps, start, 0, start, 0):
        raise ThetaError(f"theta is further from the study's first theta than {steps} outer steps lead", "start")
    if kind == "train":
        if seen := last_seen(folder, study.digest, start.size, str(start.dtype)):
            _must_follow(study, instruction, vector, start, seen, folder)
        if study.privacy.guaranteed and (folder / "ledger.sqlite").exists():
            with open_ledger(folder) as ledger:
                ledger.answered(question(study, instruction))
    return Asked(instruction, vector, unflatten(torch.from_numpy(vector.copy()), layout))


def _must_follow(
    study: Study, instruction: Instruction, theta: Vector, start: Vector, seen: Seen, folder: Path
) -> None:
    """Compare a theta with the one that was seen last.

    A coordinator goes from round to round, and a round has one theta. One that goes on from a checkpoint asks to join
    before, and may have gone back some rounds. A study without a guarantee may even have begun anew: then only the
    distance from its first theta counts.
    """
    number, before = instruction.round, seen.round - 1
    if number <= seen.round:
        if not seen.joined and instruction.theta not in thetas_of(folder, study.digest).get(number, ()):
            raise ContractError(
                f"round {number} comes after round {seen.round} or with another theta, and no run began since", "replay"
            )
        return
    common = before if not seen.joined else max(0, before - KEPT) if study.privacy.guaranteed else 0
    if not reach_of(study).within(theta, number - 1, seen.theta, before, start, common):
        raise ThetaError(
            f"theta of round {number} is further from that of round {seen.round}, which this site saw last, than the "
            "study's outer steps lead",
            "step",
        )


@lru_cache(maxsize=8)
def _start(study: Study) -> tuple[Theta, Vector]:
    layout = first_theta(study)
    return layout, flatten(layout).numpy()

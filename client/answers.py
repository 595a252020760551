"""What a site answers: one line per step of a round. In the ClientApp's process, or in the site's worker."""

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from secrets import token_hex

import torch
from flwr.app import Error, RecordDict

from client.evaluation import evaluate
from client.release import note_unprotected, release
from client.session import Session, open_session
from common.contract import TRAIN, Instruction, Kind, check_instruction, pack_reply, theta_digest
from common.errors import ContractError, WardroundError
from common.meta import flatten, unflatten
from common.models.network import Theta

__all__ = ["answer"]


def answer(
    kind: Kind, content: RecordDict, run_config: Mapping[str, object], node_config: Mapping[str, object]
) -> RecordDict | Error:
    """Answer a message. Every exception becomes a code and an incident number: exception text can name a patient.

    Parameters
    ----------
    kind : {"join", "train", "evaluate"}
        What Flower's message type asks for.
    content : RecordDict
        The message's.
    run_config, node_config : mapping
        As `client.session.open_session` takes them.
    """
    session = None
    try:
        session = open_session(run_config, node_config)
        return _ANSWERS[kind](content, session)
    except Exception as error:
        incident = token_hex(4)
        if session is not None:  # the text stays in the site's own folder
            # Where that cannot be written, nothing may be raised: Flower would send its text.
            with suppress(OSError), (session.site.folder / "incidents.log").open("a") as log:
                log.write(f"incident {incident}\n{traceback.format_exc()}\n")
        code = error.code if isinstance(error, WardroundError) else WardroundError.code
        return Error(code, f"incident {incident}")


def read(content: RecordDict, session: Session) -> tuple[Instruction, Theta]:
    """Check a message against the contract and return its instruction and theta."""
    like = flatten(session.theta).numpy()
    instruction, vector = check_instruction(content, study=session.study.digest, size=like.size, dtype=str(like.dtype))
    if vector is None:
        return instruction, session.theta
    if theta_digest(vector, {name: tuple(t.shape) for name, t in session.theta.items()}) != instruction.theta:
        raise ContractError("theta is not the one that the instruction names")
    return instruction, unflatten(torch.from_numpy(vector.copy()), session.theta)


def join(content: RecordDict, session: Session) -> RecordDict:
    """Say that this site takes part, and which site it is."""
    instruction, _ = read(content, session)
    return pack_reply(instruction, {"site": session.site.index})


def train(content: RecordDict, session: Session) -> RecordDict:
    """Return one meta-gradient over freshly drawn episodes."""
    instruction, theta = read(content, session)
    if session.held_out:
        raise ContractError("this site is held out in the study: it never trains")
    if not 1 <= instruction.round <= session.study.study.rounds:
        raise ContractError(f"the study has {session.study.study.rounds} rounds, and this is not one of them")
    vector, scalars = release(session, theta, instruction)
    if session.study.privacy.figures == "withheld":
        scalars = dict.fromkeys(TRAIN, -1.0)
    return pack_reply(instruction, scalars, vector)


def evaluate_theta(content: RecordDict, session: Session) -> RecordDict:
    """Return what adapting theta gives on patients that never train; nothing where the study withholds figures."""
    instruction, theta = read(content, session)
    if session.study.privacy.figures == "withheld":
        raise ContractError("privacy.figures is 'withheld' in the study: no site evaluates")
    note_unprotected(session.site.folder, session.study.digest)
    return pack_reply(instruction, evaluate(session, theta, instruction))


_ANSWERS: Mapping[Kind, Callable[[RecordDict, Session], RecordDict]] = {
    "join": join,
    "train": train,
    "evaluate": evaluate_theta,
}

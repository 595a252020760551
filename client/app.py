"""The ClientApp: thin, one line per step of a round."""

import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from secrets import token_hex

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.evaluation import evaluate
from client.release import note_unprotected, release
from client.session import Session, open_session
from common.contract import TRAIN, Instruction, check_instruction, pack_reply, theta_digest
from common.errors import ContractError, WardroundError
from common.meta import flatten, unflatten
from common.models.network import Theta

__all__ = ["app"]

app = ClientApp()

Answer = Callable[[Message, Session], Message]
Handler = Callable[[Message, Context], Message]


def guarded(answer: Answer) -> Handler:
    """Turn every exception into a code and an incident number: exception text can name a patient."""

    @wraps(answer)
    def handler(message: Message, context: Context) -> Message:
        session = None
        try:
            session = open_session(context.run_config, context.node_config)
            return answer(message, session)
        except Exception as error:
            incident = token_hex(4)
            if session is not None:  # the text stays in the site's own folder
                # Where that cannot be written, nothing may be raised: Flower would send its text.
                with suppress(OSError), (session.site.folder / "incidents.log").open("a") as log:
                    log.write(f"incident {incident}\n{traceback.format_exc()}\n")
            code = error.code if isinstance(error, WardroundError) else WardroundError.code
            return Message(Error(code, f"incident {incident}"), reply_to=message)

    return handler


def read(message: Message, session: Session) -> tuple[Instruction, Theta]:
    """Check a message against the contract and return its instruction and theta."""
    like = flatten(session.theta).numpy()
    instruction, vector = check_instruction(
        message.content, study=session.study.digest, size=like.size, dtype=str(like.dtype)
    )
    if vector is None:
        return instruction, session.theta
    if theta_digest(vector, {name: tuple(t.shape) for name, t in session.theta.items()}) != instruction.theta:
        raise ContractError("theta is not the one that the instruction names")
    return instruction, unflatten(torch.from_numpy(vector.copy()), session.theta)


@app.query("join")
@guarded
def join(message: Message, session: Session) -> Message:
    """Say that this site takes part, and which site it is."""
    instruction, _ = read(message, session)
    return Message(pack_reply(instruction, {"site": session.site.index}), reply_to=message)


@app.train()
@guarded
def train(message: Message, session: Session) -> Message:
    """Return one meta-gradient over freshly drawn episodes."""
    instruction, theta = read(message, session)
    if session.held_out:
        raise ContractError("this site is held out in the study: it never trains")
    if not 1 <= instruction.round <= session.study.study.rounds:
        raise ContractError(f"the study has {session.study.study.rounds} rounds, and this is not one of them")
    vector, scalars = release(session, theta, instruction)
    if session.study.privacy.figures == "withheld":
        scalars = dict.fromkeys(TRAIN, -1.0)
    return Message(pack_reply(instruction, scalars, vector), reply_to=message)


@app.evaluate()
@guarded
def evaluate_theta(message: Message, session: Session) -> Message:
    """Return what adapting theta gives on patients that never train; nothing where the study withholds figures."""
    instruction, theta = read(message, session)
    if session.study.privacy.figures == "withheld":
        raise ContractError("privacy.figures is 'withheld' in the study: no site evaluates")
    note_unprotected(session.site.folder, session.study.digest)
    return Message(pack_reply(instruction, evaluate(session, theta, instruction)), reply_to=message)

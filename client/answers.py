"""What a site answers: one line per step of a round. In the ClientApp's process, or in the site's worker."""

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from secrets import token_hex

from flwr.app import Error, RecordDict

from client.admission import Asked, admit
from client.evaluation import evaluate
from client.release import note_unprotected, release
from client.session import Session, open_session, site_folder
from client.trail import note_join, note_theta
from common.contract import TRAIN, Kind, pack_reply
from common.errors import ContractError, WardroundError
from common.study import Study

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
        As `client.session.open_session` and `client.admission.admit` take them.
    """
    folder = None
    try:
        study = Study.from_run_config(run_config)
        folder = site_folder(study, node_config)
        asked = admit(kind, content, study, folder, node_config)
        return _ANSWERS[kind](asked, open_session(run_config, node_config))
    except Exception as error:
        incident = token_hex(4)
        if folder is not None:  # the text stays in the site's own folder
            # Where that cannot be written, nothing may be raised: Flower would send its text.
            with suppress(OSError), (folder / "incidents.log").open("a") as log:
                log.write(f"incident {incident}\n{traceback.format_exc()}\n")
        code = error.code if isinstance(error, WardroundError) else WardroundError.code
        return Error(code, f"incident {incident}")


def join(asked: Asked, session: Session) -> RecordDict:
    """Say that this site takes part, and which site it is."""
    note_join(session.site.folder, session.study.digest)
    return pack_reply(asked.instruction, {"site": session.site.index})


def train(asked: Asked, session: Session) -> RecordDict:
    """Return one meta-gradient over freshly drawn episodes."""
    instruction, study = asked.instruction, session.study
    if session.held_out:
        raise ContractError("this site is held out in the study: it never trains")
    note_theta(session.site.folder, study.digest, instruction.round, instruction.theta, asked.vector)
    vector, scalars = release(session, asked.theta, instruction)
    if study.privacy.figures == "withheld":
        scalars = dict.fromkeys(TRAIN, -1.0)
    return pack_reply(instruction, scalars, vector)


def evaluate_theta(asked: Asked, session: Session) -> RecordDict:
    """Return what adapting theta gives on patients that never train."""
    note_unprotected(session.site.folder, session.study.digest)
    return pack_reply(asked.instruction, evaluate(session, asked.theta, asked.instruction))


_ANSWERS: Mapping[Kind, Callable[[Asked, Session], RecordDict]] = {
    "join": join,
    "train": train,
    "evaluate": evaluate_theta,
}

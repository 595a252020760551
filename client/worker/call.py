"""The ClientApp's side: hand a message over to the worker."""

from collections.abc import Mapping

import grpc
from flwr.app import Error, RecordDict

from client.worker.wire import CHANNEL, METHOD, SERVICE, pack_question, unpack_answer
from common.contract import Kind
from common.errors import WardroundError

__all__ = ["hand_over"]


def hand_over(
    socket: str, kind: Kind, content: RecordDict, run_config: Mapping[str, object], seconds: float
) -> RecordDict | Error:
    """Return the worker's answer to a message.

    Parameters
    ----------
    socket : str
        Path of the worker's socket.
    kind, content, run_config
        As `client.answers.answer` takes them. The site's folder is the worker's own affair.
    seconds : float
        How long an answer is of use.

    Raises
    ------
    WardroundError
        The worker is not there, ended, or did not answer in time.
    """
    with grpc.insecure_channel(f"unix:{socket}", CHANNEL) as channel:
        call = channel.unary_unary(f"/{SERVICE}/{METHOD}")
        try:
            return unpack_answer(call(pack_question(kind, content, run_config), timeout=seconds))
        except grpc.RpcError as error:
            raise WardroundError(
                f"no answer from the worker at {socket} ({error.code().name}): does `wardround-site worker` run?"
            ) from None

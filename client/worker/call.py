"""The ClientApp's side: hand a message over to the worker."""

import time
from collections.abc import Mapping

import grpc
from flwr.app import Error, RecordDict

from client.worker.wire import CHANNEL, METHOD, SERVICE, pack_question, unpack_answer
from common.contract import Kind
from common.errors import WardroundError

__all__ = ["hand_over"]

#: How long a worker that is not there is waited for: it may be starting.
_PATIENCE_SECONDS = 20.0

_OPTIONS = [*CHANNEL, ("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]


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
    until = time.monotonic() + seconds
    with grpc.insecure_channel(f"unix:{socket}", _OPTIONS) as channel:
        call = channel.unary_unary(f"/{SERVICE}/{METHOD}")
        try:
            grpc.channel_ready_future(channel).result(min(seconds, _PATIENCE_SECONDS))
            answer = call(pack_question(kind, content, run_config), timeout=max(0.0, until - time.monotonic()))
        except grpc.FutureTimeoutError:
            raise WardroundError(
                f"there is no worker at {socket}: start `wardround-site worker`, or look into its log"
            ) from None
        except grpc.RpcError as error:
            raise WardroundError(
                f"the worker at {socket} did not answer ({error.code().name}): look into its log"
            ) from None
    return unpack_answer(answer)

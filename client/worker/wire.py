"""What ClientApp and worker say to each other: a line of JSON, then Flower's records as Flower packs them."""

import json
from collections.abc import Mapping
from typing import get_args

from flwr.app import Error, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Records

from common.contract import Kind
from common.errors import ContractError

__all__ = ["CHANNEL", "METHOD", "SERVICE", "pack_answer", "pack_question", "unpack_answer", "unpack_question"]

SERVICE = "wardround.Worker"
METHOD = "Answer"
#: Messages hold theta: as large as gRPC can have them.
CHANNEL = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def pack_question(kind: Kind, content: RecordDict, run_config: Mapping[str, object]) -> bytes:
    """Return a message as the worker gets it."""
    return _pack({"kind": kind, "run_config": dict(run_config)}, content)


def unpack_question(data: bytes) -> tuple[Kind, RecordDict, dict[str, object]]:
    """Return a message's kind, its content and the run's configuration.

    Raises
    ------
    ContractError
        The bytes are not a question.
    """
    head, content = _unpack(data)
    run_config = head.get("run_config")
    for kind in get_args(Kind):
        if kind == head.get("kind") and isinstance(run_config, dict):
            return kind, content, run_config
    raise ContractError("the ClientApp asks for something that this worker does not know")


def pack_answer(answer: RecordDict | Error) -> bytes:
    """Return an answer as the ClientApp gets it."""
    if isinstance(answer, Error):
        return _pack({"code": answer.code, "reason": answer.reason}, RecordDict())
    return _pack({}, answer)


def unpack_answer(data: bytes) -> RecordDict | Error:
    """Return an answer.

    Raises
    ------
    ContractError
        The bytes are not an answer.
    """
    head, content = _unpack(data)
    return Error(int(str(head["code"])), str(head["reason"])) if "code" in head else content


def _pack(head: Mapping[str, object], content: RecordDict) -> bytes:
    return b"\n".join((json.dumps(head).encode(), recorddict_to_proto(content).SerializeToString()))


def _unpack(data: bytes) -> tuple[dict[str, object], RecordDict]:
    head, _, content = data.partition(b"\n")
    try:
        found = json.loads(head)
        if isinstance(found, dict):
            return found, recorddict_from_proto(Records.FromString(content))
    except Exception:  # whatever the bytes are
        pass
    raise ContractError("the worker and the ClientApp are of different versions of wardround")

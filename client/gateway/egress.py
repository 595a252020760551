"""What may leave this site as the answer to a message: the declared numbers in the one form that they have, or nothing.

A message travels as Flower's objects: the message, its records, arrays and chunks, each named by its SHA-256. Parsers
are lenient, and what they pass over (blanks, order, repeated keys, unknown fields) could carry something. So nothing is
judged by how it looks: the numbers are taken out, checked by the contract, and packed again here. What comes out must
be, object for object and byte for byte, what was to leave.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from common.contract import Instruction, check_reply, pack_reply
from common.errors import ContractError, EgressError, WardroundError
from common.study import Study

__all__ = ["Asked", "Passed", "examine", "largest", "refusal"]

#: Everything in a message beside the numbers of its vector is shorter, in bytes.
_FRAME = 16384

_HEAD = re.compile(rb"([A-Za-z]{1,20}) ((?:[0-9a-f]{64}(?:,[0-9a-f]{64})*)?) ([0-9]{1,12})\0")

#: Clocks within one site agree to so many seconds.
_SKEW = 5.0


@dataclass(frozen=True)
class Asked:
    """The message that is answered, as it came in.

    Attributes
    ----------
    metadata : Metadata
        Flower's: run, nodes, message and its kind.
    instruction : Instruction
        The checked content.
    size : int
        Number of elements D of the study's theta.
    """

    metadata: Metadata
    instruction: Instruction
    size: int


@dataclass(frozen=True)
class Passed:
    """What may leave.

    Attributes
    ----------
    kind : str
        The instruction's kind, or ``error``.
    root : str
        Name of the message among the objects.
    objects : mapping
        From SHA-256 to bytes. Of an error, without the text that came with it: the root is then another one.
    size : int
        Bytes of all objects.
    norm : float
        Euclidean norm of the vector; 0 where there is none.
    error : int
        The code of an error; 0 where it is none.
    """

    kind: str
    root: str
    objects: Mapping[str, bytes]
    size: int
    norm: float = 0.0
    error: int = 0


def examine(study: Study, asked: Asked, root: str, objects: Mapping[str, bytes], now: float) -> Passed:
    """Return what may leave as the answer to a message.

    Parameters
    ----------
    study : Study
        The approved study.
    asked : Asked
        The message that is answered.
    root : str
        Name of the object that is the message.
    objects : mapping
        All objects of the message, from name to bytes.
    now : float
        The time, in seconds since 1970.

    Raises
    ------
    EgressError
        The message is anything else than the declared numbers in their one form; its ``why`` says which.
    """
    message = _inflate(study, asked, root, objects)
    metadata = _expected(asked.metadata, message.metadata.created_at, now)
    if message.has_error():
        code = message.error.code
        parts, new = _deflate(make_message(metadata, error=Error(code if code in _codes() else WardroundError.code)))
        if len(objects) > 1:
            raise EgressError("an error has no other objects", "objects")
        return Passed("error", new, parts, sum(map(len, parts.values())), error=code if code in _codes() else 100)
    content, norm = _content(study, asked, message.content)
    parts, new = _deflate(make_message(metadata, content=content))
    if new != root or parts != dict(objects):
        raise EgressError(
            "the message is not in the one form that these numbers have: something was added, repeated or reordered",
            "form",
        )
    return Passed(asked.instruction.kind, root, parts, sum(map(len, parts.values())), norm)


def refusal(asked: Metadata, code: int, now: float) -> Passed:
    """Return an answer that says with a code, and nothing else, that a message is not answered.

    Parameters
    ----------
    asked : Metadata
        Of the message.
    code : int
        One of ours or of Flower's.
    now : float
        The time, in seconds since 1970.
    """
    # An answer is not older than its message, whatever this site's clock says.
    created = round(max(now, asked.created_at), 6)
    metadata = _expected(asked, created, created)
    parts, root = _deflate(make_message(metadata, error=Error(code)))
    return Passed("error", root, parts, sum(map(len, parts.values())), error=code)


def largest(study: Study, asked: Asked) -> int:
    """Return the most bytes that an answer to a message can have."""
    vector = asked.size * np.dtype(study.wire.dtype).itemsize
    return _FRAME + (vector if asked.instruction.kind == "train" else 0)


def _inflate(study: Study, asked: Asked, root: str, objects: Mapping[str, bytes]) -> Message:
    """Return the message that the objects are, having limited what is parsed."""
    total, allowed = sum(map(len, objects.values())), largest(study, asked)
    if total > allowed:
        raise EgressError(f"the message has {total} bytes, and an answer to this one at most {allowed}", "size")
    for name, data in objects.items():
        head = _HEAD.match(data)
        if head is None or int(head[3]) != len(data) - head.end():
            raise EgressError("an object has no head that Flower writes", "format")
        if name != get_object_id(data):
            raise EgressError("an object's name is not the SHA-256 of its bytes", "object-id")
    try:
        # Flower's parser takes what it reads out of the mapping.
        message = inflate_object_from_contents(root, dict(objects))
    except Exception:  # whatever a parser raises over such bytes; its text may quote them
        raise EgressError("the objects are not a message of Flower's", "format") from None
    if not isinstance(message, Message):
        raise EgressError("the outermost object is not a message", "format")
    return message


def _content(study: Study, asked: Asked, content: RecordDict) -> tuple[RecordDict, float]:
    """Return the declared numbers of a message's content, packed again, and the norm of the vector."""
    instruction = asked.instruction
    try:
        reply = check_reply(content, instruction, size=asked.size, dtype=study.wire.dtype)
    except ContractError as error:
        raise EgressError(str(error), error.why) from None
    withheld = study.privacy.figures == "withheld"
    if withheld and (
        instruction.kind == "evaluate" or (instruction.kind == "train" and set(reply.scalars.values()) != {-1.0})
    ):
        raise EgressError("the study withholds losses and accuracies, and the message has some", "figures")
    norm = 0.0
    if reply.vector is not None:
        norm = float(np.linalg.norm(reply.vector.astype(np.float64)))
        bound = study.aggregation.max_norm
        if not np.isfinite(norm) or (bound and norm > bound):
            raise EgressError(f"the norm of the meta-gradient is {norm:.3g}, and the study allows {bound:.3g}", "norm")
    # The contract has checked everything that packing depends on.
    scalars = {name: int(value) if instruction.kind == "join" else value for name, value in reply.scalars.items()}
    return pack_reply(instruction, scalars, reply.vector), norm


def _expected(asked: Metadata, created: float, now: float) -> Metadata:
    """Return the metadata that an answer has. Only the time at which it was made is its own, to the microsecond."""
    # Where this site's clock is behind the coordinator's, an answer seems to be older than its message.
    if not min(asked.created_at, now) - _SKEW <= created <= now + _SKEW or round(created, 6) != created:
        raise EgressError("the message says that it was made at another time than it can have been", "time")
    return Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=created,
        ttl=asked.created_at + asked.ttl - created,
        message_type=asked.message_type,
        src_task_id=asked.dst_task_id,
        dst_task_id=asked.src_task_id,
    )


def _deflate(message: Message) -> tuple[dict[str, bytes], str]:
    with no_object_id_recompute():
        parts = {name: value.deflate() for name, value in get_all_nested_objects(message).items()}
        return parts, message.object_id


def _codes() -> set[int]:
    """Return the codes that an error may have: one of ours or of Flower's; any other number could be a message."""
    kinds: list[type[WardroundError]] = [WardroundError, *WardroundError.__subclasses__()]
    ours = {kind.code for kind in kinds}
    return ours | {value for name, value in vars(ErrorCode).items() if name.isupper()}

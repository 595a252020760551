"""What comes in: a message of the coordinator's, checked before the node sees any of it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, Metadata
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from client.gateway.egress import Asked
from common.contract import check_instruction
from common.errors import ContractError
from common.study import Study

__all__ = ["MOST_OBJECTS", "Handed", "metadata_of", "names", "open_message"]

#: Objects of one message.
MOST_OBJECTS = 4096

_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass
class Handed:
    """A message that was handed to the node, until it is answered.

    Attributes
    ----------
    proto, tree
        Flower's, as they came.
    asked : Asked
        Its checked content.
    study, bundle : Study, str
        Which it belongs to, and the SHA-256 of the bundle that answers it.
    objects : dict
        Of the message, until the node has confirmed them.
    confirmed : bool
        Whether it has.
    times : int
        How often the node was told of it.
    """

    proto: ProtoMessage
    tree: ObjectTree
    asked: Asked
    study: Study
    bundle: str
    objects: dict[str, bytes] = field(default_factory=dict)
    confirmed: bool = False
    times: int = 0

    @property
    def until(self) -> float:
        """When the message ends, in seconds since 1970."""
        return self.asked.metadata.created_at + self.asked.metadata.ttl


def metadata_of(proto: ProtoMessage, node: int) -> Metadata:
    """Return a message's metadata.

    Raises
    ------
    ContractError
        The message is not one to this node.
    """
    metadata = metadata_from_proto(proto.metadata)
    if metadata.dst_node_id != node or metadata.reply_to_message_id or not _NAME.fullmatch(metadata.message_id):
        raise ContractError("the message is not one to this node", "metadata")
    return metadata


def names(tree: ObjectTree) -> Iterator[str]:
    """Yield the names of all objects of a tree, each once, children first.

    Raises
    ------
    ContractError
        One is no SHA-256, or there are too many.
    """
    seen: set[str] = set()
    for count, name in enumerate(_walk(tree)):
        if count >= MOST_OBJECTS or not _NAME.fullmatch(name):
            raise ContractError("the message's tree of objects is not one that Flower makes", "tree")
        if name not in seen:
            seen.add(name)
            yield name


def open_message(metadata: Metadata, objects: Mapping[str, bytes], study: Study, size: int) -> Asked:
    """Return what is asked.

    Parameters
    ----------
    metadata : Metadata
        Of the message.
    objects : mapping
        All its objects.
    study : Study
        The approved study.
    size : int
        Number of elements D of its theta, as it was approved.

    Raises
    ------
    ContractError
        The objects are not a message of the study.
    """
    if any(get_object_id(data) != name for name, data in objects.items()):
        raise ContractError("an object's name is not the SHA-256 of its bytes", "object-id")
    try:
        message = inflate_object_from_contents(metadata.message_id, dict(objects))
    except Exception:  # whatever a parser raises over such bytes
        raise ContractError("the objects are not a message of Flower's", "format") from None
    if not isinstance(message, Message) or not message.has_content():
        raise ContractError("the objects are not a message with content", "format")
    instruction, _ = check_instruction(message.content, study=study.digest, size=size, dtype=study.wire.dtype)
    # A SuperLink that keeps its state in a file forgets these two of what it hands out; the answer has them.
    metadata.src_task_id, metadata.dst_task_id = message.metadata.src_task_id, message.metadata.dst_task_id
    return Asked(metadata, instruction, size)


def _walk(tree: ObjectTree) -> Iterator[str]:
    for child in tree.children:
        yield from _walk(child)
    yield tree.object_id

"""What is to leave: an answer whose objects come one by one and in any order, kept here until it is whole."""

from collections.abc import Mapping
from secrets import token_hex

from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    get_object_id,
)

from client.gateway.egress import Passed
from client.gateway.incoming import names
from common.errors import ContractError, EgressError

__all__ = ["Outgoing", "as_flower_sends"]


class Outgoing:
    """An answer that is being collected.

    Parameters
    ----------
    root : str
        Name of the object that is the message.
    tree : ObjectTree
        The names of all objects, as the node says.
    limit : int
        Bytes that all objects may have.

    Attributes
    ----------
    session : str
        By which the node names this collection.
    objects : dict
        What has come.

    Raises
    ------
    EgressError
        The tree is not that of a message.
    """

    def __init__(self, root: str, tree: ObjectTree, limit: int) -> None:
        try:
            self.names = frozenset(names(tree))
        except ContractError as error:
            raise EgressError(str(error), error.why) from None
        if tree.object_id != root:
            raise EgressError("the tree of objects is that of another message", "tree")
        self.root, self.session = root, token_hex(16)
        self.objects: dict[str, bytes] = {}
        self._left = limit

    @property
    def missing(self) -> set[str]:
        """Names of the objects that have not come."""
        return set(self.names) - set(self.objects)

    def add(self, session: str, name: str, data: bytes) -> bool:
        """Take an object; say whether it belongs to this collection. One that came already may come again.

        Raises
        ------
        EgressError
            It is not what its name says, or there are more bytes than any answer has.
        """
        if session != self.session or name not in self.names:
            return False
        if get_object_id(data) != name:
            raise EgressError("an object's name is not the SHA-256 of its bytes", "object-id")
        if name not in self.objects:
            self._left -= len(data)
            if self._left < 0:
                raise EgressError("the answer has more bytes than any to this message", "size")
            self.objects[name] = data
        return True


def as_flower_sends(passed: Passed) -> tuple[ProtoMessage, ObjectTree]:
    """Return an answer's message without its content, and the tree of its objects, made from what has been judged."""
    _, _, body = passed.objects[passed.root].partition(b"\0")
    proto = ProtoMessage.FromString(body)
    proto.metadata.message_id = passed.root
    if not proto.HasField("error"):
        proto.content.CopyFrom(RecordDict())
    return proto, _tree(passed.root, passed.objects)


def _tree(name: str, objects: Mapping[str, bytes]) -> ObjectTree:
    children = get_object_children_ids_from_object_content(objects[name])
    return ObjectTree(object_id=name, children=[_tree(child, objects) for child in children])

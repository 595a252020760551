"""One local round at the study's first theta, as the ClientApp runs it: what exactly would be sent. Nothing is."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute

from client.app import app
from client.gateway.egress import Asked, Passed, examine
from client.session import open_session
from client.trail import note_join, thetas_of
from common.contract import Instruction, Kind, Reply, check_reply, pack_instruction, theta_digest
from common.errors import DataError, explain
from common.meta import flatten
from common.study import Study

__all__ = ["Preview", "preview"]

_TYPES: Mapping[Kind, str] = {"join": "query.join", "train": "train", "evaluate": "evaluate"}

#: Stands where Flower puts the number of this site's node.
_NODE = 2


@dataclass(frozen=True)
class Preview:
    """What a site would send.

    Attributes
    ----------
    passed : Passed
        Every byte, as the gateway's rule lets it through.
    reply : Reply
        The numbers in it.
    seconds : float
        What the round took.
    """

    passed: Passed
    reply: Reply
    seconds: float


def preview(study: Study, site: Path, kind: Kind) -> Preview:
    """Run one local round and return what would be sent.

    Parameters
    ----------
    study : Study
        Whose round.
    site : Path
        The site's folder.
    kind : {"join", "train", "evaluate"}
        Which message the site answers.

    Raises
    ------
    DataError
        The site would answer with an error.
    EgressError
        What it would send is not what the study declares: it would not leave.
    StudyError, ModelError, NotPreparedError
        As `client.session.open_session` raises them.
    """
    session = open_session(study.run_config(), {"site": str(site)})
    theta = flatten(session.theta).numpy()
    digest = theta_digest(theta, {name: tuple(tensor.shape) for name, tensor in session.theta.items()})
    instruction = (
        Instruction("join", study.digest) if kind == "join" else Instruction(kind, study.digest, 1, 1, digest, True)
    )
    if kind == "train" and max(thetas_of(site, study.digest), default=1) > 1:
        note_join(site, study.digest)  # as where a run begins: round 1 may come after others
    content = pack_instruction(instruction, None if kind == "join" else theta)
    begun = time.time()
    metadata = Metadata(
        run_id=1,
        message_id="0" * 64,
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=_NODE,
        reply_to_message_id="",
        group_id="",
        created_at=begun,
        ttl=43200.0,
        message_type=_TYPES[kind],
    )
    context = Context(1, _NODE, {"site": str(site)}, RecordDict(), study.run_config())
    answer: Message = app(make_message(metadata, content=content), context)
    if answer.has_error():
        raise DataError(
            f"the site would answer with error {answer.error.code} ({explain(answer.error.code)}; "
            f"{answer.error.reason}): the full text is in incidents.log of the site's folder"
        )
    with no_object_id_recompute():
        objects = {name: value.deflate() for name, value in get_all_nested_objects(answer).items()}
        root = answer.object_id
    passed = examine(study, Asked(metadata, instruction, theta.size), root, objects, time.time())
    reply = check_reply(answer.content, instruction, size=theta.size, dtype=study.wire.dtype)
    return Preview(passed, reply, time.time() - begun)

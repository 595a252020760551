"""Flower's fleet calls, as the gateway makes them: to one host, by this site's keys, with nothing of the node's own.

A SuperNode talks to the gateway as if it were the SuperLink. What the gateway then asks the edge is made here anew and
signed with the site's node key, so that no header, unknown field, signature or number of the node's choosing goes out.
Flower 1.41 and 1.42 have no streams among these calls.
"""

import asyncio
import re
import ssl
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import NamedTuple, TypeVar

import httpx
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from google.protobuf.message import DecodeError, Message

from client.checking.machine import clock
from client.files import read_secret
from client.membership import Joined
from common.consortium.keys import load_node_private
from common.errors import FleetError

__all__ = ["CALLS", "LARGEST_REQUEST", "Call", "Upstream", "insist"]

Response = TypeVar("Response", bound=Message)


class Call(NamedTuple):
    """What is sent and what comes back."""

    request: type[Message]
    response: type[Message]


#: Every fleet call that a SuperNode makes. Registering is answered here: the coordinator does it, from the manifest.
CALLS: Mapping[str, Call] = {
    "register-node": Call(fleet_pb2.RegisterNodeFleetRequest, fleet_pb2.RegisterNodeFleetResponse),
    "unregister-node": Call(fleet_pb2.UnregisterNodeFleetRequest, fleet_pb2.UnregisterNodeFleetResponse),
    "activate-node": Call(fleet_pb2.ActivateNodeRequest, fleet_pb2.ActivateNodeResponse),
    "deactivate-node": Call(fleet_pb2.DeactivateNodeRequest, fleet_pb2.DeactivateNodeResponse),
    "send-node-heartbeat": Call(heartbeat_pb2.SendNodeHeartbeatRequest, heartbeat_pb2.SendNodeHeartbeatResponse),
    "pull-messages": Call(fleet_pb2.PullMessagesRequest, fleet_pb2.PullMessagesResponse),
    "push-messages": Call(fleet_pb2.PushMessagesRequest, fleet_pb2.PushMessagesResponse),
    "get-run": Call(run_pb2.GetRunRequest, run_pb2.GetRunResponse),
    "get-fab": Call(fab_pb2.GetFabRequest, fab_pb2.GetFabResponse),
    "push-object": Call(message_pb2.PushObjectRequest, message_pb2.PushObjectResponse),
    "pull-object": Call(message_pb2.PullObjectRequest, message_pb2.PullObjectResponse),
    "confirm-message-received": Call(
        message_pb2.ConfirmMessageReceivedRequest, message_pb2.ConfirmMessageReceivedResponse
    ),
}

_NAMES: Mapping[type[Message], str] = {call.request: name for name, call in CALLS.items()}

#: Says the number and the hash of the audit log's last line.
HEAD_HEADER = "x-wardround-head"

#: Bytes of a request: as the edge has it, Flower's chunks have 5 MiB.
LARGEST_REQUEST = 6 * 2**20

#: Bytes of an answer: the largest is a bundle.
_LARGEST_ANSWER = 16 * 2**20

#: Bytes that are sent between two looks at the kill switch.
_PIECE = 2**16

_CONNECT_SECONDS = 10.0
_SILENT_SECONDS = 30.0
_CALL_SECONDS = 300.0
_INSIST_SECONDS = 60.0


class Upstream:
    """The way to the edge, for one membership.

    Parameters
    ----------
    member : Joined
        Whose keys and certificate are shown; the only authority that is trusted, and the only host that is called.
    proxy : str or None
        The hospital's HTTP proxy, as in ``http://proxy:3128``; without it, as the environment says (``HTTPS_PROXY``).
    paused : callable
        Whether nothing may leave. Looked at before every piece of a request.
    """

    def __init__(self, member: Joined, proxy: str | None, paused: Callable[[], bool]) -> None:
        self.member, self._paused = member, paused
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(member.keys / "authority.pem")
        context.load_cert_chain(member.keys / "certificate.pem", member.keys / "tls.key")
        self._key = load_node_private(read_secret(member.keys / "node.key"))
        self._headers = {
            "content-type": PROTOBUF_MEDIA_TYPE,
            "accept": PROTOBUF_MEDIA_TYPE,
            "accept-encoding": "identity",
            "user-agent": "wardround",
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(member.member.node.encode()).decode(),
            **dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()),
        }
        try:
            self._client = httpx.AsyncClient(
                verify=context,
                proxy=proxy,
                timeout=httpx.Timeout(_SILENT_SECONDS, connect=_CONNECT_SECONDS),
                follow_redirects=False,
            )
        except (ValueError, ImportError, httpx.InvalidURL):
            raise FleetError("the proxy is not an address such as http://proxy:3128") from None

    async def call(self, request: Message, response: type[Response], head: str = "") -> Response:
        """Make a call.

        Parameters
        ----------
        request, response
            What is sent, and the kind of what comes back.
        head : str
            Of the audit log: it goes along in a header, for the edge to keep.

        Raises
        ------
        FleetError
            Nothing may leave, the edge cannot be reached, or it or the SuperLink refuses.
        """
        name = _NAMES[type(request)]
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                status, answer, skew = await self._post(name, request.SerializeToString(deterministic=True), head)
        except TimeoutError:
            raise FleetError(f"{self.member.manifest.edge} took too long to answer {name}") from None
        except httpx.HTTPError as error:
            raise FleetError(
                f"{self.member.manifest.edge} cannot be reached ({type(error).__name__}): `wardround-site doctor` says "
                "what is in the way"
            ) from None
        if status != httpx.codes.OK:
            raise _refusal(name, status, answer, skew)
        try:
            found: Response = response.FromString(answer)
        except DecodeError:
            raise FleetError(f"the answer to {name} is not Flower's: is something in between?") from None
        found.DiscardUnknownFields()
        return found

    async def _post(self, name: str, body: bytes, head: str) -> tuple[int, bytes, float]:
        timestamp = now().isoformat()
        signed = b64encode(sign_message(self._key, timestamp.encode("ascii"))).decode()
        headers = {
            **self._headers,
            "content-length": str(len(body)),
            TIMESTAMP_HEADER: timestamp,
            FLEET_HTTP_SIGNATURE_HEADER: signed,
            **({HEAD_HEADER: head} if head else {}),
        }
        self._must_be_open()
        url = f"https://{self.member.manifest.edge}/v1/fleet/{name}"
        async with self._client.stream("POST", url, content=self._pieces(body), headers=headers) as response:
            answer = bytearray()
            async for piece in response.aiter_raw():
                answer += piece
                if len(answer) > _LARGEST_ANSWER:
                    raise FleetError(f"the answer to {name} has more than {_LARGEST_ANSWER} bytes", 403)
            skew = 0.0
            with suppress(KeyError, ValueError, TypeError):
                skew = (now() - parsedate_to_datetime(response.headers["date"])).total_seconds()
            return response.status_code, bytes(answer), skew

    async def _pieces(self, body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), _PIECE):
            self._must_be_open()
            yield body[start : start + _PIECE]

    def _must_be_open(self) -> None:
        if self._paused():
            raise FleetError("nothing leaves this site: `wardround-site resume` opens it again")

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


async def insist(upstream: Upstream, request: Message, response: type[Response]) -> Response:
    """Make a call, and make it again for a while where the edge is away.

    Raises
    ------
    FleetError
        It was refused, or not answered for a minute.
    """
    until, pause = time.monotonic() + _INSIST_SECONDS, 0.25
    while True:
        try:
            return await upstream.call(request, response)
        except FleetError as error:
            if error.status == httpx.codes.FORBIDDEN or error.stranger or time.monotonic() + pause > until:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, 8.0)


def _refusal(name: str, status: int, answer: bytes, skew: float) -> FleetError:
    """Return what to say about an answer that is none, and what the node should do about it."""
    said = re.sub(r"[^ -~]", "", answer[:300].decode("ascii", "replace"))
    if status == httpx.codes.UNAUTHORIZED:
        judged = clock(skew)
        if judged.state == "fail":
            return FleetError(f"{judged.text}: {judged.remedy}")
        return FleetError("the SuperLink does not know this site's node by its number and key", stranger=True)
    if status == httpx.codes.PRECONDITION_FAILED and name == "activate-node":
        return FleetError(
            "the SuperLink does not let this site's node in: the coordinator has yet to register its node key (`flwr "
            "supernode register`), or takes an earlier process of the node for alive, for a minute"
        )
    return FleetError(f"{name} was answered with {status}: {said}", 403 if status == httpx.codes.FORBIDDEN else 503)

"""What the processes of a consortium do here: Flower's SuperLink, a site's gateway, its node, and the ServerApp.

Each is what it is in a real consortium, but for the node: a stock SuperNode starts two Python processes for a message
(`tests/simulations/test_localnet.py` has them), and here a double calls the gateway as it does.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import flower_superlink
from flwr.superlink.grid import HttpGrid

from client.gateway import fleet, outbox
from client.gateway.fleet import Upstream
from client.gateway.gateway import Gateway, Settings
from client.gateway.serve import serve
from common.errors import FleetError
from common.study import Study
from server import exchange, patience, rounds
from server.app import app
from server.exchange import Exchange
from tests.client.gateway.doubles import NodeDouble
from tests.client.hospitals import enter_run
from tests.deploy.clock import follow
from tests.server.rubbish import PATIENT
from tests.server.scripted import Scripted

__all__ = [
    "Orders",
    "Trap",
    "announcing",
    "be_coordinator",
    "be_gateway",
    "be_node",
    "be_superlink",
    "brisk",
    "duplicating",
]

Change = Callable[[], None]

#: A round, and what happens to a node in it: it dies once it has the message (``taken``), once it has its answer
#: (``answered``), or when a part of that has left (``half sent``); or it answers with an error's text (``complains``).
Trap = tuple[int, str]


def be_superlink(log: Path, clock: Path, home: Path, arguments: list[str]) -> None:
    """Run ``flower-superlink``."""
    _say_into(log)
    follow(clock)
    os.environ.update(FLWR_HOME=str(home), HOME=str(home))
    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


def be_gateway(log: Path, clock: Path, site: Path, port: int, health: str, change: Change) -> None:
    """Run ``wardround-site gateway``; ``change`` makes its surroundings others."""
    _say_into(log)
    follow(clock)
    os.environ.update(NO_PROXY="localhost,127.0.0.1")
    change()
    serve(Settings(site, None, 2**30), f"127.0.0.1:{port}", health, None)


def brisk() -> None:
    """Let the gateway wait for less long than over a real network."""
    fleet._SILENT_SECONDS, fleet._CONNECT_SECONDS = 6.0, 6.0
    outbox._LONGEST_PAUSE_SECONDS = 1.0


def duplicating() -> None:
    """Let everything that leaves arrive twice, and the answer before once more when the next one is announced."""
    brisk()
    once = Upstream._post
    earlier: list[tuple[str, bytes, str]] = []

    async def again(self: Upstream, name: str, body: bytes, head: str) -> tuple[int, bytes, float]:
        if name == "push-messages":
            for before in earlier:
                await once(self, *before)
            earlier.clear()
        answer = await once(self, name, body, head)
        if name.startswith("push-"):
            earlier.append((name, body, head))
            second = await once(self, name, body, head)
            # The second announcement has another session, which counts; a part is taken once, which the first one says.
            answer = second if name == "push-messages" else answer
        return answer

    Upstream._post = again  # type: ignore[method-assign]


def announcing() -> None:
    """Let a site say that it answers, and send nothing of what it said."""
    brisk()
    real = Upstream._post

    async def post(self: Upstream, name: str, body: bytes, head: str) -> tuple[int, bytes, float]:
        if name == "push-object":
            raise FleetError("lost", 403)
        return await real(self, name, body, head)

    Upstream._post = post  # type: ignore[method-assign]


class Door:
    """The gateway, as a process on the same machine sees it."""

    def __init__(self, port: int) -> None:
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)

    async def answer(self, name: str, body: bytes) -> bytes:
        try:
            found = await self._client.post(
                f"/v1/fleet/{name}", content=body, headers={"content-type": PROTOBUF_MEDIA_TYPE}
            )
        except httpx.TransportError as error:
            raise FleetError(str(error)) from None
        if found.status_code != 200:
            raise FleetError(found.text, found.status_code)
        return found.content


def be_node(clock: Path, port: int, number: int, study: Study, trap: Trap | None) -> None:
    """Answer messages as `Scripted` does, for ever, and die where the trap is."""
    follow(clock)
    enter_run()
    client = Scripted(study)
    context = Context(1, 1, {"partition-id": number}, RecordDict(), dict(study.run_config()))

    def trapped(message: Message, name: str) -> bool:
        instruction = message.content.config_records["instruction"]
        return trap == (instruction["round"], name) and instruction["kind"] == "train"

    def step(message: Message, name: str) -> None:
        if trapped(message, name):
            os.kill(os.getpid(), signal.SIGKILL)

    async def one_message(node: NodeDouble) -> None:
        message = await node.take()
        if message is None:
            return
        step(message, "taken")
        complains = trapped(message, "complains")
        reply = Message(Error(104, PATIENT), reply_to=message) if complains else client(message, context)
        step(message, "answered")
        said, objects = await node.announce(reply)
        for name, data in objects.items():
            await node.push(said.session_id, name, data)
            step(message, "half sent")

    async def live() -> None:
        node, beat = NodeDouble(cast(Gateway, Door(port))), 0.0
        await _until_it_works(node.begin)
        while True:
            with suppress(FleetError):
                if time.monotonic() > beat:
                    await node.call("send-node-heartbeat", node=node.node, heartbeat_interval=30)
                    beat = time.monotonic() + 10
                await one_message(node)
            await asyncio.sleep(0.02)

    asyncio.run(live())


async def _until_it_works(begin: Callable[[], Awaitable[None]]) -> None:
    while True:
        with suppress(FleetError):
            return await begin()
        await asyncio.sleep(0.1)


def be_coordinator(
    log: Path, clock: Path, superlink: str, authority: bytes, study: Study, orders: Path, resume: int | None
) -> None:
    """Take the run that waits, and run the ServerApp as `Orders` say."""
    _say_into(log)
    follow(clock)
    _obey(orders)
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    executor = RuntimeHttpClient.from_server_address(
        superlink, insecure=False, root_certificates=authority, interceptors=[version],
        retry_invoker=make_simple_http_retry_invoker(),
    )  # fmt: skip
    grid = HttpGrid(
        superlink, root_certificates=authority,
        token=executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])).token,
    )  # fmt: skip
    HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client)).start()
    task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    run = run_from_proto(task.run)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.run_id, SUPERLINK_NODE_ID, task.task_id
    grid.set_run(run)
    config = dict(study.run_config()) | ({} if resume is None else {"resume": str(resume)})
    app(grid, Context(run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), config))
    grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))


@dataclass(frozen=True)
class Orders:
    """What a test tells the coordinator, in a file that is replaced.

    Attributes
    ----------
    number : int
        The last round that may begin.
    without : str
        A site that is not waited for once all others have answered: the deadline is over then.
    seconds : float
        The deadline.
    """

    number: int = 0
    without: str = ""
    seconds: float = 30.0

    def give(self, path: Path) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)))
        part.replace(path)


def _obey(path: Path) -> None:
    """Let rounds begin, and their deadlines end, when the test says so: how fast this machine is does not matter."""
    one_round, ask, ahead = rounds._Run._one_round, Exchange.ask, [0.0]

    def orders() -> Orders:
        return Orders(**json.loads(path.read_text()))

    def clock() -> float:
        return time.monotonic() + ahead[0]

    def when_it_may(self: Any, number: int) -> None:
        while number > orders().number:
            time.sleep(0.01)
        one_round(self, number)

    def until_it_is_over(self: Exchange, nodes: Mapping[str, int], *arguments: Any, **options: Any) -> Iterator[Any]:
        left = set(nodes)
        for outcome in ask(self, nodes, *arguments, **options | {"seconds": orders().seconds}):
            left.remove(outcome.site)
            ahead[0] += 1e5 * (left == {orders().without})
            yield outcome

    rounds._Run._one_round = when_it_may  # type: ignore[method-assign]
    rounds._PAUSE_SECONDS = rounds._LONGEST_PAUSE_SECONDS = 0.2
    Exchange.ask = until_it_is_over  # type: ignore[method-assign]
    for module in (exchange, patience):
        module.time = SimpleNamespace(monotonic=clock, sleep=time.sleep, time=time.time)  # type: ignore[attr-defined]


def _say_into(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(file, number)

"""What a gateway says of its health, and to whom."""

import asyncio
import errno
import time
from pathlib import Path
from threading import Event as Flag

import pytest

from client.gateway.audit import Event
from client.gateway.gateway import Gateway
from client.gateway.health import answering
from client.gateway.switch import pause
from common.errors import FleetError
from deploy.health import ask
from tests.client.gateway.doubles import NodeDouble, honest, question, set_up
from tests.ports import free_port


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_it_is_asked_of_the_gateway_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, address = set_up(tmp_path, monkeypatch), f"127.0.0.1:{free_port()}"
    line = Event(outcome="refused", kind="message")

    async def said(service: str = "") -> str:
        return await asyncio.to_thread(ask, address, service, 60)

    async def story() -> None:
        async with here.gateway() as gateway, answering(address, {"": gateway.health}):
            assert await said() == "SERVING"
            with monkeypatch.context() as patch:
                patch.setattr("client.gateway.audit.os.write", full)
                assert not gateway._out.note(line)
            assert await said() == "NOT_SERVING"
            assert await said("liveness") == "SERVING", "starting it anew would not help"
            assert gateway._out.note(line)
            assert await said() == "SERVING"
            pause(here.site)
            assert await said() == "SERVING", "it does what it was told to"
            assert await said("something else") == "NOT_FOUND"
            with pytest.raises(FleetError, match=f"{address}: --health takes another"):
                async with answering(address, {"": gateway.health}):
                    pass

    asyncio.run(story())
    assert ask(address, seconds=60) == "UNAVAILABLE"


def test_one_that_hangs_does_not_answer() -> None:
    address, entered, over = f"127.0.0.1:{free_port()}", Flag(), Flag()

    def hang() -> bool:
        entered.set()
        return over.wait(60)

    def asked_meanwhile() -> str:
        assert entered.wait(60)
        try:
            return ask(address, "liveness", 0.2)
        finally:
            over.set()

    async def story() -> tuple[str, str]:
        async with answering(address, {"": hang}):
            waiting = asyncio.to_thread(ask, address, "", 60)
            first, second = await asyncio.gather(waiting, asyncio.to_thread(asked_meanwhile))
            return first, second

    assert asyncio.run(story()) == ("SERVING", "DEADLINE_EXCEEDED")


class Later:
    """The time, and by how much it is later than it is."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self) -> float:
        return time.time() + self.seconds

    def monotonic(self) -> float:
        return time.monotonic() + self.seconds


def test_a_node_hangs_that_asks_for_nothing_and_has_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, clock = set_up(tmp_path, monkeypatch), Later()
    monkeypatch.setattr("client.gateway.gateway.time", clock)

    def works(gateway: Gateway, seconds: float) -> bool:
        """Say whether a node works that is silent for so long."""
        clock.seconds += seconds
        try:
            return gateway.node_works()
        finally:
            clock.seconds -= seconds

    async def story() -> None:
        async with here.gateway() as gateway:
            assert works(gateway, 50)
            assert not works(gateway, 70), "it never came"
            node = NodeDouble(gateway)
            clock.seconds = 1000.0
            assert not works(gateway, 0)
            await node.begin()
            assert works(gateway, 50)

            asked = here.link.ask(question())
            message = await node.take()
            assert message is not None
            lasts = asked.metadata.created_at + asked.metadata.ttl - clock.time()
            assert works(gateway, lasts + 50)
            assert not works(gateway, lasts + 70), "nobody waits for the answer any more"
            said, objects = await node.announce(honest(message))
            assert works(gateway, 50)
            assert not works(gateway, 70), "its parts do not come"
            clock.seconds += 70
            name, data = objects.popitem()
            assert await node.push(said.session_id, name, data)
            assert works(gateway, 50)
            clock.seconds += 70
            await node.call("send-node-heartbeat", node=node.node, heartbeat_interval=30.0)
            assert not works(gateway, 0), "a node that hangs sends heartbeats"
            for name, data in objects.items():
                assert await node.push(said.session_id, name, data)
            assert works(gateway, 50)

            here.link.away = 10**6
            asking = asyncio.create_task(node.take())
            await asyncio.sleep(0)
            assert works(gateway, 70), "it asks, and waits for the edge's answer"
            with pytest.raises(FleetError):
                await asking
            assert works(gateway, 50)
            assert not works(gateway, 70)

    asyncio.run(story())

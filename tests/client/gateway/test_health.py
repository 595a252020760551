"""What a gateway says of its health, and to whom."""

import asyncio
import errno
from pathlib import Path
from threading import Event as Flag

import pytest

from client.gateway.audit import Event
from client.gateway.health import answering
from client.gateway.switch import pause
from common.errors import FleetError
from deploy.health import ask
from tests.client.gateway.doubles import set_up
from tests.server.consortium.test_edge import free_port


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_it_is_asked_of_the_gateway_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, address = set_up(tmp_path, monkeypatch), f"127.0.0.1:{free_port()}"
    line = Event(outcome="refused", kind="message")

    async def said(service: str = "") -> str:
        return await asyncio.to_thread(ask, address, service, 60)

    async def story() -> None:
        async with here.gateway() as gateway, answering(address, gateway.health):
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
                async with answering(address, gateway.health):
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
        async with answering(address, hang):
            waiting = asyncio.to_thread(ask, address, "", 60)
            first, second = await asyncio.gather(waiting, asyncio.to_thread(asked_meanwhile))
            return first, second

    assert asyncio.run(story()) == ("SERVING", "DEADLINE_EXCEEDED")

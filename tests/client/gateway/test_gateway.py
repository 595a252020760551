"""A gateway between a node and a SuperLink that are doubles: what passes, what does not, and what both are told."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import client.gateway.gateway as room
from client.gateway.audit import Entry, Head, check, read_lines
from client.gateway.cli import audit_path
from client.gateway.fleet import CALLS
from client.gateway.gateway import Gateway
from client.gateway.switch import pause, resume
from client.membership import store
from common.canonical import sha256_hex
from common.errors import ApprovalError, AuditError, ClockError, ContractError, EgressError, FleetError
from server.consortium import members
from tests.client.gateway.doubles import NODE, STUDY, D, NodeDouble, Setup, bundle, honest, question, set_up
from tests.server.consortium.founded import NOW


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    return set_up(tmp_path, monkeypatch)


def run(here: Setup, story: Callable[[Gateway, NodeDouble], Awaitable[None]], **settings: Any) -> list[Entry]:
    """Let a node talk to a gateway; return the lines of the audit log, checked."""

    async def all_of_it() -> None:
        async with here.gateway(**settings) as gateway:
            node = NodeDouble(gateway)
            await node.begin()
            await story(gateway, node)

    asyncio.run(asyncio.wait_for(all_of_it(), 60))
    return log(here)


def log(here: Setup) -> list[Entry]:
    lines, _ = read_lines(audit_path(here.site))
    return [entry for entry, _ in check(lines, store.identity(here.site).public_key())]


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


def outcomes(lines: list[Entry]) -> list[tuple[str, str, str]]:
    return [(line.event.outcome, line.event.kind, line.event.why) for line in lines]


@pytest.mark.parametrize("forgetful", [False, True])
@pytest.mark.parametrize("kind", ["join", "train"])
def test_an_honest_answer_arrives_as_it_was_and_is_in_the_log(here: Setup, kind: str, forgetful: bool) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.forgetful = forgetful
        here.link.ask(question(kind, 3))
        message = await node.take()
        assert message is not None
        reply = honest(message)
        assert await node.send(reply)
        await until(here.link.answers)
        (answer,) = here.link.answers()
        assert answer.object_id == reply.object_id
        assert await node.take() is None

    lines = run(here, story)
    assert outcomes(lines) == [("admitted", "code", ""), ("sent", kind, "")]
    sent = lines[1].event
    assert (sent.round, sent.run, sent.study) == (3, 7, STUDY.digest)
    assert sent.size == sum(map(len, here.link.arrived.values()))
    assert (sent.norm > 0) == (kind == "train")


def test_a_message_whose_objects_are_still_being_sent_is_waited_for(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        here.link.slow = dict.fromkeys(list(here.link.objects)[:2], 1)
        while await node.take() is None:
            pass
        here.link.ask(question(number=2))
        here.link.objects.popitem()  # never announced, or gone
        assert await node.take() is None

    assert outcomes(run(here, story))[:2] == [("admitted", "code", ""), ("refused", "message", "object")]


def test_a_bundle_that_nobody_approved_does_not_reach_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = set_up(tmp_path, monkeypatch, approved=False)

    async def story(gateway: Gateway, node: NodeDouble) -> None:
        asked = here.link.ask(question())
        assert await node.take() is None
        await until(here.link.answers)
        (answer,) = here.link.answers()
        assert answer.metadata.reply_to_message_id == asked.metadata.message_id
        assert (answer.error.code, answer.error.reason) == (ApprovalError.code, None)
        for call, fields in (("get-run", {}), ("get-fab", {"hash_str": sha256_hex(here.fab)})):
            with pytest.raises(FleetError) as error:
                await node.call(call, node=node.node, run_id=7, **fields)
            assert error.value.status == 403
        assert "pull-object" not in here.link.calls
        # Approved while the gateway runs: the next message of the same run is shown.
        here.approve()
        here.link.ask(question(number=2))
        assert await node.take() is not None

    lines = run(here, story)
    assert outcomes(lines)[:2] == [("refused", "message", "bundle-waiting"), ("sent", "error", "code-120")]
    assert any("wardround-site approvals" in line for line in here.said)


def test_while_a_run_is_on_a_node_that_asks_gets_the_next_message_as_soon_as_there_is_one(
    here: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.gateway.gateway._HOLD_SECONDS", 20.0)

    async def gone() -> bool:
        return True

    async def story(gateway: Gateway, node: NodeDouble) -> None:
        assert await node.take() is None  # at once: no run is on
        here.link.ask(question("join"))
        assert (message := await node.take())
        assert await node.send(honest(message))
        asked = asyncio.create_task(node.take())
        calls = len(here.link.calls)
        await until(lambda: len(here.link.calls) > calls + 3)
        assert not asked.done()
        here.link.ask(question("train", 1))
        assert (message := await asked)
        assert await node.send(honest(message))
        request = CALLS["pull-messages"].request(node=node.node).SerializeToString()
        assert await gateway.answer("pull-messages", request, gone) == b""  # at once: it has hung up
        monkeypatch.setattr("client.gateway.gateway._RUN_IS_ON_SECONDS", 0.0)
        assert await node.take() is None  # at once: the run is long over

    assert [line.event.kind for line in run(here, story)] == ["code", "join", "train"]


@pytest.mark.parametrize("which", ["study", "bundle"])
def test_what_was_rejected_or_withdrawn_does_not_run(here: Setup, which: str) -> None:
    digest = STUDY.digest if which == "study" else sha256_hex(here.fab)
    authority = here.world.authority
    manifest = members.forbid(authority.manifest(), [digest], NOW)
    signed = authority.publish(manifest)

    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        assert await node.take() is not None
        store.update(here.site, signed, NOW)  # read anew at the next message
        here.links.append(here.link)
        before = here.links[0]
        await node.call("send-node-heartbeat", node=node.node)
        here.link.ask(question(number=2))
        assert here.link is not before
        assert await node.take() is None
        here.reject(digest)
        here.link.ask(question(number=3))
        assert await node.take() is None
        await until(lambda: len(here.link.roots) == 2)

    refused = [line.event.why for line in run(here, story) if line.event.outcome == "refused"]
    assert refused == [f"{which}-not-admitted", f"{which}-rejected"]


def test_a_message_of_another_study_or_bundle_is_not_shown(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        other = STUDY.override({"study.rounds": 3})
        here.link.ask(question(study=other))  # says another study than the run
        assert await node.take() is None
        here.link.override = {"study.rounds": 3}
        here.link.fab = bundle(STUDY)
        await until(here.link.answers)

    why = [line.event.why for line in run(here, story) if line.event.outcome == "refused"]
    assert why == ["contract"]


def test_values_of_a_run_make_another_study_that_waits(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.override = {"study.rounds": 3}
        here.link.ask(question(study=STUDY.override({"study.rounds": 3})))
        assert await node.take() is None

    why = [line.event.why for line in run(here, story) if line.event.outcome == "refused"]
    assert why == ["study-waiting"]


def test_a_theta_of_another_size_than_was_approved_is_refused(here: Setup) -> None:
    here.approve(size=D + 1)

    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        assert await node.take() is None
        await until(here.link.answers)
        assert here.link.answers()[0].error.code == ContractError.code

    run(here, story)


def pixels() -> dict[str, Any]:
    return {"pixels": ArrayRecord([np.full(9, 17, np.float32)])}


SMUGGLED: dict[str, tuple[Callable[[Message], Message], str]] = {
    "another record": (lambda asked: honest(asked, records=pixels()), "records"),
    "text": (lambda asked: honest(asked, records={"note": ConfigRecord({"name": "DOE^JANE"})}), "records"),
    "too much": (lambda asked: honest(asked, records={"x": ArrayRecord([np.zeros(30000)])}), "size"),
    "text as metadata": (lambda asked: named(honest(asked), group_id="DOE^JANE"), "form"),
}  # fmt: skip


def named(message: Message, **metadata: Any) -> Message:
    for name, value in metadata.items():
        message.metadata.__dict__[f"_{name}"] = value
    return message


@pytest.mark.parametrize("name", SMUGGLED)
def test_what_is_not_declared_does_not_leave_and_the_run_is_told(here: Setup, name: str) -> None:
    make, why = SMUGGLED[name]

    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        assert not await node.send(make(message))
        await until(here.link.answers)
        (answer,) = here.link.answers()
        assert answer.error.code == EgressError.code
        # Of a message that was answered no second answer is taken.
        with pytest.raises(FleetError):
            await node.send(honest(message))

    lines = run(here, story)
    assert ("refused", "train", why) in outcomes(lines)
    assert b"DOE" not in b"".join(here.link.arrived.values()) + audit_path(here.site).read_bytes()
    assert "DOE" not in "".join(here.said)


def test_an_error_leaves_as_its_code(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        assert await node.send(Message(Error(104, "no such file /data/DOE^JANE"), reply_to=message))
        await until(here.link.answers)
        assert here.link.answers()[0].error == Error(104)

    lines = run(here, story)
    assert outcomes(lines)[-1] == ("sent", "error", "code-104")
    assert b"DOE" not in b"".join(here.link.arrived.values())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_in_whatever_order_the_parts_come_nothing_leaves_before_the_last(here: Setup, data: st.DataObject) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        said, objects = await node.announce(honest(message))
        order = data.draw(st.permutations(sorted(objects)))
        again = data.draw(st.lists(st.sampled_from(order[:-1]), max_size=3))
        for name in [*order[:-1], *again]:
            assert await node.push(said.session_id, name, objects[name])
            assert not await node.push(said.session_id, "f" * 64, objects[name]), "nobody announced it"
            assert not await node.push("another", name, objects[name])
        if data.draw(st.booleans()):  # Flower asks again where an answer was lost on the way
            assert set((await node.announce(honest_again(message, objects)))[0].objects_to_push) <= set(order)
        await asyncio.sleep(0)
        assert "push-messages" not in here.link.calls
        assert await node.push(said.session_id, order[-1], objects[order[-1]])
        await until(lambda: set(here.link.arrived) == set(objects))

    run(here, story)


def honest_again(message: Message, objects: dict[str, bytes]) -> Message:
    """Return the same answer, made at the same moment."""
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    root = next(name for name, body in objects.items() if body.startswith(b"Message "))
    again = inflate_object_from_contents(root, dict(objects))
    assert isinstance(again, Message)
    assert again.metadata.reply_to_message_id == message.metadata.message_id
    return again


def test_an_object_that_is_not_what_its_name_says_ends_the_answer(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        said, objects = await node.announce(honest(message))
        name, other, *_rest = objects
        assert not await node.push(said.session_id, name, objects[other])
        assert not await node.push(said.session_id, name, objects[name]), "it is over"
        await until(here.link.answers)
        assert here.link.answers()[0].has_error()

    assert ("refused", "train", "object-id") in outcomes(run(here, story))


def test_an_answer_that_lacks_a_part_does_not_leave(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        said, objects = await node.announce(honest(message))
        for name in list(objects)[1:]:
            await node.push(said.session_id, name, objects[name])
        await asyncio.sleep(0.1)
        assert not here.link.roots

    run(here, story)


def test_an_answer_to_nothing_is_refused(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        with pytest.raises(FleetError) as error:
            await node.send(honest(question()))
        assert error.value.status == 403
        with pytest.raises(FleetError) as error:
            await node.call("pull-messages", node={"node_id": NODE + 1})
        assert error.value.status == 401
        for name, status in (("get-runs", 403), ("../control/start-run", 403)):
            with pytest.raises(FleetError) as error:
                await node.gateway.answer(name, b"")
            assert error.value.status == status
        with pytest.raises(FleetError):
            await node.gateway.answer("get-run", b"\xff\xff")

    assert outcomes(run(here, story)) == [("refused", "message", "unasked")]


def test_a_pause_holds_what_was_judged_and_resuming_lets_it_go(here: Setup) -> None:
    async def story(gateway: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        pause(here.site)
        assert await node.send(honest(message))
        calls = len(here.link.calls)
        with pytest.raises(FleetError):
            await node.call("send-node-heartbeat", node=node.node)
        await asyncio.sleep(0.6)
        assert len(here.link.calls) == calls
        assert not any(line.event.outcome == "sent" for line in log(here))
        assert gateway.health(), "it does what it was told to"
        resume(here.site)
        await until(here.link.answers)

    assert outcomes(run(here, story))[-1] == ("sent", "train", "")


def test_what_was_rejected_during_a_pause_does_not_leave_after_it(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        pause(here.site)
        assert await node.send(honest(message))
        here.reject(STUDY.digest)
        resume(here.site)
        await until(here.link.answers)
        assert here.link.answers()[0].error.code == ApprovalError.code

    assert ("refused", "train", "study-rejected") in outcomes(run(here, story))


def test_a_pause_outlives_the_gateway(here: Setup) -> None:
    pause(here.site)
    with pytest.raises(FleetError, match="nothing leaves"):
        run(here, lambda _gateway, _node: asyncio.sleep(0))
    (here.site / "gateway" / "switch").write_bytes(b"opened by mistake")
    with pytest.raises(FleetError, match="nothing leaves"):
        run(here, lambda _gateway, _node: asyncio.sleep(0))


def test_a_day_has_so_many_bytes_also_after_a_restart(here: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_utc", lambda: NOW)  # and no other day begins

    async def one(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        await node.send(honest(message))
        await until(here.link.answers)

    lines = run(here, one)
    size = lines[-1].event.size
    lines = run(here, one, daily=2 * size - 1)
    assert outcomes(lines)[-2:] == [("refused", "train", "daily-bytes"), ("sent", "error", "code-113")]
    assert outcomes(run(here, one, daily=10 * size))[-1] == ("sent", "train", "")


def test_the_head_that_goes_along_has_the_answers_own_line(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        for number in (1, 2):
            here.link.ask(question(number=number))
            message = await node.take()
            assert message is not None
            await node.send(honest(message))
            while len(here.link.answers()) < number:
                await asyncio.sleep(0.01)

    lines = run(here, story)
    heads = [Head.parse(text) for text in here.link.heads]
    assert [lines[head.seq - 1].event.round for head in heads] == [1, 2]
    assert [lines[head.seq - 1].event.outcome for head in heads] == ["sent", "sent"]
    list(check(read_lines(audit_path(here.site))[0], store.identity(here.site).public_key(), heads))


def test_while_the_edge_is_away_an_answer_waits_and_is_written_down_once(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        here.link.away = 2
        assert await node.send(honest(message))
        await until(here.link.answers)

    assert outcomes(run(here, story)).count(("sent", "train", "")) == 1


def test_an_answer_arrives_whole_though_the_line_breaks_when_a_part_has_come(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        here.link.deaf = 2
        assert await node.send(honest(message))
        await until(here.link.answers)

    assert outcomes(run(here, story)).count(("sent", "train", "")) == 1


def test_a_disk_that_is_full_lets_nothing_leave(here: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(gateway: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            assert await node.send(honest(message))
            await until(lambda: not gateway.health())
            await asyncio.sleep(0.1)
            assert not here.link.roots
        # There is space again: the next answer leaves.
        here.link.ask(question(number=2))
        message = await node.take()
        assert message is not None
        assert await node.send(honest(message))
        await until(here.link.answers)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    lines = run(here, story)
    assert [line.event.round for line in lines if line.event.outcome == "sent"] == [2]
    assert any("No space left" in line for line in here.said)


def test_a_node_that_starts_anew_is_let_in_and_what_it_forgot_is_answered(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        assert await node.take() is not None
        await node.begin()
        assert here.link.calls[-2:] == ["deactivate-node", "activate-node"]
        await until(here.link.answers)
        assert here.link.answers()[0].error.code == 5

    run(here, story)


def test_a_node_that_the_superlink_knows_no_longer_is_let_in_anew_and_need_not_know(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        here.link.number = NODE + 7  # its database is a new one, or this site's keys are
        here.link.ask(question(number=2, node=NODE + 7))
        beats = [node.call("send-node-heartbeat", node=node.node) for _ in range(3)]
        assert all(beat.success for beat in await asyncio.gather(*beats))
        assert here.link.calls.count("activate-node") == 2
        assert await node.send(honest(message))  # it was asked before
        other = await node.take()
        assert other is not None
        assert await node.send(honest(other))
        await until(lambda: len(here.link.answers()) == 2)
        assert here.link.answers()[1].metadata.src_node_id == NODE + 7

    assert outcomes(run(here, story))[1:] == [("sent", "train", "")] * 2
    assert (here.site / "gateway" / "node").read_text() == str(NODE + 7)


def test_a_node_goes_on_with_its_heartbeats_while_the_edge_refuses_the_site(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.refuses = True
        # After 403 a SuperNode would never send one again.
        for call in ("send-node-heartbeat", "activate-node"):
            with pytest.raises(FleetError, match="not in the manifest") as error:
                await node.call(call, **({"node": node.node} if call == "send-node-heartbeat" else {}))
            assert error.value.status == 503
        here.link.refuses = False
        assert (await node.call("send-node-heartbeat", node=node.node)).success

    run(here, story)


def test_a_message_that_a_node_does_not_take_is_given_up(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        for _time in range(3):
            assert (await node.call("pull-messages", node=node.node)).messages_list
        assert not (await node.call("pull-messages", node=node.node)).messages_list
        await until(here.link.answers)

    run(here, story)


def test_a_clock_that_is_behind_the_coordinators_keeps_no_run_waiting(here: Setup) -> None:
    here.reject(STUDY.digest)

    async def story(_: Gateway, node: NodeDouble) -> None:
        asked = later(60)
        here.link.ask(asked)
        assert await node.take() is None
        await until(here.link.answers)
        (answer,) = here.link.answers()
        assert answer.metadata.created_at >= asked.metadata.created_at - 1e-6

    run(here, story)


def later(seconds: float) -> Message:
    """Return a question that the coordinator made at a time that is yet to come here."""
    asked = question()
    asked.metadata.created_at += seconds
    asked.metadata.__dict__["_message_id"] = asked.object_id
    return asked


def test_a_clock_that_is_behind_as_flower_lets_it_keeps_no_answer_back(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(later(290))
        message = await node.take()
        assert message is not None
        assert await node.send(honest(message))
        await until(here.link.answers)

    assert ("sent", "train", "") in outcomes(run(here, story))


def test_a_message_of_another_time_is_refused_before_images_are_read(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(later(3600))
        assert await node.take() is None
        await until(here.link.answers)
        (answer,) = here.link.answers()
        assert answer.error.code == ClockError.code

    found = run(here, story)
    assert ("refused", "message", "clock") in outcomes(found)


def test_a_message_larger_than_any_of_its_study_is_not_taken(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        message = here.link.ask(question())
        here.link.objects[message.metadata.message_id] = bytes(2**21)
        assert await node.take() is None

    assert ("refused", "message", "size") in outcomes(run(here, story))


def test_what_was_judged_still_leaves_when_the_gateway_ends(here: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_FINISH_SECONDS", 60.0)

    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        here.link.away = 1
        assert await node.send(honest(message))

    run(here, story)
    assert here.link.answers()


def test_a_log_whose_lines_were_changed_is_said(here: Setup) -> None:
    async def story(_: Gateway, node: NodeDouble) -> None:
        here.link.ask(question())
        assert await node.take() is not None
        await node.begin()

    run(here, story)
    path = audit_path(here.site)
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first.replace(b"{", b"[", 1) + b"".join(rest))
    with pytest.raises(AuditError, match="verify"):
        here.gateway()


def test_calls_are_slowed_down(here: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_RATE", 0.0)

    async def story(_: Gateway, node: NodeDouble) -> None:
        beats = [node.call("send-node-heartbeat", node=node.node) for _ in range(100)]
        errors = [
            found for found in await asyncio.gather(*beats, return_exceptions=True) if found.__class__ is FleetError
        ]
        assert len(errors) == 62  # the node has made two calls already
        assert {error.status for error in errors} == {503}

    run(here, story)


def test_nothing_of_the_nodes_own_goes_out(here: Setup) -> None:
    seen: list[Any] = []

    async def story(_: Gateway, node: NodeDouble) -> None:
        real = here.link.call

        async def call(request: Any, response: Any, head: str = "") -> Any:
            seen.append(request)
            return await real(request, response, head)

        here.link.call = call  # type: ignore[method-assign]
        await node.begin()
        await node.call("send-node-heartbeat", node=node.node, heartbeat_interval=87654.125)
        await node.call("pull-messages", node=node.node, message_ids=["DOE^JANE"])
        here.link.ask(question())
        message = await node.take()
        assert message is not None
        await node.send(honest(message))
        await until(here.link.answers)

    run(here, story)
    text = "".join(map(str, seen))
    for word in ("DOE", "87654.125", "anything", "98765.4321", "clientapp_runtime"):
        assert word not in text.replace(STUDY.digest, "")
    assert seen[1].public_key == here.link.member.member.node.encode()

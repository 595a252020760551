"""One exchange: everyone is asked, in windows; results come in the order of the sites, judged one by one."""

import time
from collections.abc import Callable, Iterable, Iterator
from email.utils import formatdate
from itertools import cycle
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from common.contract import Instruction, pack_instruction, pack_reply
from common.errors import NotPreparedError, WardroundError
from server import exchange as module
from server.exchange import Answer, Exchange, Refusal
from simulations.engines.inprocess import InProcessGrid, transmit
from tests.client.hospitals import enter_run
from tests.server.scripted import a_grid, a_study

JOIN = Instruction("join", a_study().digest)


def joins(message: Message) -> Message:
    return Message(pack_reply(JOIN, {"site": message.metadata.dst_node_id}), reply_to=message)


class Post(InProcessGrid):
    """A grid whose replies are put there by hand."""

    def __init__(self, order: Iterable[int], reply: Callable[[Message], Message] | None = None) -> None:
        super().__init__(client=None, run_config={}, sites=0)  # type: ignore[arg-type]
        self.order, self.reply = list(order), reply or joins
        self.windows: list[int] = []
        self.messages: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self.windows.append(len(sent))
        ids = [f"{len(self.windows)}/{m.metadata.dst_node_id}" for m in sent]
        for message_id, message in zip(ids, sent, strict=True):
            message.metadata.__dict__["_message_id"] = message_id
            self.messages[message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        for node in self.order:
            for key, message in self.messages.items():
                if key in wanted and message.metadata.dst_node_id == node:
                    return [self.reply(message)]
        return []


@pytest.fixture(autouse=True)
def in_a_run() -> None:
    enter_run()


def ask(grid: InProcessGrid, nodes: dict[str, int], seconds: float = 20.0) -> Iterator[Answer | Refusal]:
    return Exchange(grid).ask(nodes, JOIN, pack_instruction(JOIN), size=0, dtype="float32", seconds=seconds)


def test_results_come_in_the_order_of_the_sites_whoever_answers_first() -> None:
    nodes = {f"ward {i}": 10 + i for i in range(5)}
    grid = Post(order=[14, 12, 10, 13, 11])
    results = list(ask(grid, nodes))
    assert [r.site for r in results] == list(nodes)
    assert [r.reply.scalars["site"] for r in results if isinstance(r, Answer)] == [10, 11, 12, 13, 14]


def test_many_sites_are_asked_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW", 4)
    nodes = {f"ward {i}": i + 1 for i in range(10)}
    grid = Post(order=range(1, 11))
    assert [r.site for r in ask(grid, nodes)] == list(nodes)
    assert grid.windows == [4, 4, 2]


def test_who_is_silent_is_named_and_the_others_still_count() -> None:
    nodes = {"a": 1, "b": 2, "c": 3}
    first, second, third = ask(Post(order=[3, 1]), nodes, seconds=0.2)
    assert isinstance(first, Answer)
    assert second == Refusal("b", 0, "no-reply", "no reply before the deadline")
    assert isinstance(third, Answer)
    assert list(ask(Post(order=[]), {}, seconds=0.2)) == []


def test_the_deadline_is_by_a_clock_that_nobody_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    now, of_day = iter(range(0, 10**6, 100)), cycle([0.0, 1e9])
    times = SimpleNamespace(monotonic=lambda: next(now), sleep=lambda _: None, time=lambda: next(of_day))
    monkeypatch.setattr(module, "time", times)
    results = list(ask(Post(order=[]), {"a": 1, "b": 2}, seconds=1000.0))
    assert [type(r) for r in results] == [Refusal, Refusal]
    assert next(now) <= 100 * 60  # a handful of looks


@pytest.mark.parametrize(("behind", "set_meanwhile", "blamed"), [(9, 0, True), (9, 9, True), (0, -9, False)])
def test_a_clock_that_is_behind_flowers_is_the_one_that_the_message_was_made_by(
    behind: float, set_meanwhile: float, blamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = [-behind]
    monkeypatch.setattr(
        module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=time.sleep, time=lambda: time.time() + ahead[0])
    )

    class Refusing(Post):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ahead[0] += set_meanwhile
            request = httpx.Request("POST", "http://flower")
            answer = httpx.Response(400, headers={"date": formatdate(usegmt=True)}, request=request)
            raise httpx.HTTPStatusError("the message is over", request=request, response=answer)

    if blamed:
        assert [(r.site, r.why) for r in ask(Refusing(order=[]), {"a": 1}) if isinstance(r, Refusal)] == [
            ("a", "unsent")
        ]
    else:
        with pytest.raises(httpx.HTTPStatusError):
            list(ask(Refusing(order=[]), {"a": 1}))


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (NotPreparedError.code, "the site's folder for this study does not exist yet"),
        (WardroundError.code, "an unexpected error at the site"),
        (5, "the site went away"),
        (8, "the site's process crashed"),
        (2, "an error in Flower"),
        (4711, "an error in Flower"),
        (-1, "an error in Flower"),
    ],
)
def test_an_errors_code_is_explained(code: int, meaning: str) -> None:
    grid = Post(order=[1], reply=lambda message: Message(Error(code, "text"), reply_to=message))
    assert list(ask(grid, {"a": 1})) == [Refusal("a", code, "error", meaning)]


def test_an_error_without_a_reason_is_one_too() -> None:
    grid = Post(order=[1], reply=lambda message: Message(Error(100), reply_to=message))
    assert list(ask(grid, {"a": 1})) == [Refusal("a", 100, "error", "an unexpected error at the site")]


def test_a_reply_of_another_kind_is_a_refusal() -> None:
    (refusal,) = ask(Post(order=[1], reply=lambda message: Message(RecordDict(), reply_to=message)), {"a": 1})
    assert isinstance(refusal, Refusal)
    assert refusal.code == 102
    assert "holds exactly ['scalars']" in refusal.reason


def test_a_message_is_the_same_after_its_way_over_the_wire() -> None:
    message = Message(pack_instruction(JOIN), 7, "query.join")
    message.metadata.__dict__["_message_id"] = "an id"
    received, size = transmit(message)
    assert received is not message
    assert received.content == message.content
    assert received.metadata.message_id == "an id"
    assert (received.metadata.dst_node_id, received.metadata.message_type) == (7, "query.join")
    assert size == sum(len(value.deflate()) for value in get_all_nested_objects(message).values())
    error = Message(Error(104, "incident 0123abcd"), reply_to=message)
    assert transmit(error)[0].error.reason == "incident 0123abcd"


def test_the_scripted_sites_are_real_enough() -> None:
    study = a_study()
    nodes = {f"hospital-{i}": node for i, node in enumerate(a_grid(study).get_node_ids())}
    results = list(ask(a_grid(study), nodes))
    assert [r.reply.scalars["site"] for r in results if isinstance(r, Answer)] == [0, 1, 2, 3]

"""Who is asked: sites that come, go and fail, in a fixed order, under one name each."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RoundError
from common.study import Study
from server.exchange import Exchange, Refusal
from server.roster import Roster
from simulations.engines.inprocess import InProcessGrid
from tests.client.hospitals import enter_run
from tests.server.scripted import Scripted, a_study


class Town(InProcessGrid):
    """Nodes that a test moves: node id to site number."""

    def __init__(self, study: Study, nodes: dict[int, int]) -> None:
        super().__init__(Scripted(study), study.run_config(), study.data.sites)
        self.town = dict(nodes)
        self.registered: dict[int, str] = {}
        self.since: dict[int, str] = {}

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node, name=self.registered.get(node, ""), registered_at=self.since.get(node, ""))
            for node in self.town
        ]

    def _run(self, message: Any) -> Any:
        message.metadata.__dict__["_dst_node_id"] = 1000 + self.town[message.metadata.dst_node_id]
        return super()._run(message)


def a_roster(
    nodes: dict[int, int] | None = None, needed: int = 2, changes: Mapping[str, Any] | None = None
) -> tuple[Roster, Town, list[tuple[str, str]]]:
    enter_run()
    study = a_study({"sites.held-out": "", "sites.join-seconds": 0.3, "sites.deadline-seconds": 0.3, **(changes or {})})
    town = Town(study, nodes or {10: 0, 11: 1, 12: 2, 13: 3})
    events: list[tuple[str, str]] = []
    exchange = Exchange(town)
    return Roster(study, exchange, lambda event, **about: events.append((event, about["site"])), needed), town, events


def failure(site: str) -> Refusal:
    return Refusal(site, 0, "no-reply", "no reply before the deadline")


def test_sites_are_in_their_order_whatever_their_nodes() -> None:
    roster, _, events = a_roster({31: 2, 7: 3, 99: 0, 8: 1})
    roster.gather(start=True)
    assert list(roster.choose(1, 1).asked.items()) == [
        ("hospital-0", 99), ("hospital-1", 8), ("hospital-2", 31), ("hospital-3", 7),
    ]  # fmt: skip
    assert sorted(events) == [("joined", f"hospital-{i}") for i in range(4)]


def test_a_site_that_leaves_is_away_and_one_that_comes_back_elsewhere_is_the_same() -> None:
    roster, town, events = a_roster()
    roster.gather(start=True)
    roster.failed(failure("hospital-1"), 1)
    del town.town[11]
    roster.refresh()
    choice = roster.choose(2, 1)
    assert list(choice.asked) == ["hospital-0", "hospital-2", "hospital-3"]
    assert choice.away == ("hospital-1",)
    town.town[77] = 1
    roster.refresh()
    assert roster.choose(3, 1).asked["hospital-1"] == 77
    assert roster.sites["hospital-1"].failures == 1  # it is not forgotten
    assert events[-2:] == [("left", "hospital-1"), ("joined", "hospital-1")]


def test_a_second_node_of_a_site_is_turned_away_until_the_first_is_gone() -> None:
    roster, town, events = a_roster()
    roster.gather(start=True)
    town.town[77] = 1
    roster.refresh()
    assert roster.choose(2, 1).asked["hospital-1"] == 11
    assert events[-1] == ("rejected", "node 77")
    (refusal,) = roster.refusals
    assert "two nodes say that they are hospital-1" in refusal.reason
    del town.town[11]
    roster.refresh()
    assert roster.choose(3, 1).away == ("hospital-1",)
    roster.gather()  # before another attempt, who was turned away is asked again
    assert roster.choose(3, 2).asked["hospital-1"] == 77


def test_at_the_start_two_nodes_of_a_site_are_an_error() -> None:
    roster, _, _ = a_roster({10: 0, 11: 1, 12: 1})
    with pytest.raises(RoundError, match="two nodes say that they are hospital-1: every site has one node"):
        roster.gather(start=True)
    roster, town, _ = a_roster({10: 0, 11: 1, 12: 2})
    town.registered = {10: "Charité", 11: "Charité", 12: "Mayo"}
    with pytest.raises(RoundError, match="two nodes say that they are Charité"):
        roster.gather(start=True)


@pytest.mark.parametrize("start", [True, False])
def test_a_site_with_new_keys_goes_on_at_once_though_its_old_node_still_seems_to_be_there(start: bool) -> None:
    roster, town, events = a_roster({10: 0, 11: 1, 12: 2})
    town.registered = {10: "Mayo", 11: "Charité", 12: "Ward", 3: "Charité"}
    town.since = {10: "2026-11-28T21:00:00+00:00", 11: "2026-11-28T21:00:01+00:00", 3: "2026-11-28T21:00:01.5+00:00"}
    if start:
        town.town[3] = 1
        roster.gather(start=True)
    else:
        roster.gather(start=True)
        assert roster.choose(1, 1).asked["Charité"] == 11
        town.town[3] = 1
        roster.refresh(1)
        assert events[-2:] == [("left", "Charité"), ("joined", "Charité")]
    assert roster.choose(1, 1).asked == {"Charité": 3, "Mayo": 10, "Ward": 12}


def test_a_registered_name_is_the_sites_whatever_it_says_itself() -> None:
    roster, town, _ = a_roster({10: 0, 11: 1})
    town.registered = {10: "ward 10", 11: "ward 9"}
    roster.gather(start=True)
    assert list(roster.sites) == ["ward 9", "ward 10"]


def test_who_fails_often_rests_longer_each_time_and_is_named() -> None:
    roster, _, events = a_roster(changes={"sites.rest-after": 2})
    roster.gather(start=True)
    rests: list[int] = []
    number = 1
    for _ in range(9):
        while "hospital-2" not in roster.choose(number, 1).asked:
            assert roster.choose(number, 1).resting["hospital-2"] > number
            number += 1
        roster.failed(failure("hospital-2"), number)
        rests.append(roster.sites["hospital-2"].rests_until - number - 1 if len(rests) >= 1 else 0)
        number += 1
    assert rests == [0, 1, 2, 4, 8, 16, 16, 16, 16]
    assert events.count(("resting", "hospital-2")) == 8
    while "hospital-2" not in roster.choose(number, 1).asked:
        number += 1
    roster.answered("hospital-2", number)
    assert (roster.sites["hospital-2"].failures, roster.sites["hospital-2"].last_round) == (0, number)
    assert "hospital-2" in roster.choose(number + 1, 1).asked


def test_nobody_rests_where_the_quorum_needs_them() -> None:
    roster, _, _ = a_roster(needed=4, changes={"sites.rest-after": 1})
    roster.gather(start=True)
    roster.failed(failure("hospital-0"), 1)
    assert "hospital-0" in roster.choose(2, 1).asked
    assert not roster.choose(2, 1).resting


@settings(max_examples=30)
@given(count=st.integers(2, 3), number=st.integers(1, 1000), attempt=st.integers(1, 3))
def test_a_sample_is_the_same_for_everybody_and_another_in_another_round(count: int, number: int, attempt: int) -> None:
    roster, _, _ = a_roster(changes={"sites.per-round": count})
    roster.gather(start=True)
    choice = roster.choose(number, attempt)
    assert roster.choose(number, attempt) == choice
    assert len(choice.asked) == count
    assert sorted([*choice.asked, *choice.idle]) == [f"hospital-{i}" for i in range(4)]
    assert list(choice.asked) == sorted(choice.asked)
    asked = [set(roster.choose(n, attempt).asked) for n in range(number, number + 40)]
    assert set().union(*asked) == {f"hospital-{i}" for i in range(4)}
    assert len({frozenset(a) for a in asked}) > 1


def test_a_restored_roster_chooses_the_same() -> None:
    roster, town, _ = a_roster(changes={"sites.rest-after": 1, "sites.per-round": 2})
    roster.gather(start=True)
    roster.failed(failure("hospital-3"), 4)
    roster.answered("hospital-0", 4)
    other = Roster(roster._study, Exchange(town), lambda *_, **__: None, 2)
    other.restore(json.loads(json.dumps(roster.state())))
    assert other.choose(5, 1).away == tuple(f"hospital-{i}" for i in range(4))
    other.gather(start=True)
    for number in range(5, 12):
        assert other.choose(number, 1) == roster.choose(number, 1)

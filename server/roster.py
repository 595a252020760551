"""Who takes part: sites by name, the nodes that they answer from, and who is asked in a round."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from flwr.proto.node_pb2 import NodeInfo

from common.canonical import canonical_json, sha256_hex
from common.contract import Instruction, pack_instruction
from common.errors import NotPreparedError, RoundError
from common.study import Study
from server.exchange import Exchange, Note, Refusal
from server.runs import natural

__all__ = ["Choice", "Roster", "SiteState"]

_LONGEST_REST_ROUNDS = 16
_POLL_SECONDS = 0.1


@dataclass
class SiteState:
    """What the coordinator knows of a site.

    Attributes
    ----------
    held_out : bool
        It never trains.
    node : int or None
        Flower's node that it answers from; None while it is away.
    failures : int
        Attempts in a row in which it was asked and gave no valid reply.
    rests_until : int
        The round in which it is asked again.
    last_round : int
        The last round that it counted in; 0 for none.
    reason : str
        Why it did not count when it was last asked; empty where it did.
    """

    held_out: bool
    node: int | None = None
    failures: int = 0
    rests_until: int = 0
    last_round: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """Who is asked in an attempt.

    Attributes
    ----------
    asked : mapping
        Nodes of the sites that are asked, in the fixed order of the sites.
    away : tuple of str
        Sites that are not connected.
    resting : mapping
        Sites that failed too often, and the round in which each is asked again.
    idle : tuple of str
        Sites that were not drawn.
    """

    asked: Mapping[str, int]
    away: tuple[str, ...] = ()
    resting: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Refused:
    """A node that did not join: why, how often, and the round in which it is asked again."""

    refusal: Refusal
    times: int
    again: int


class Roster:
    """The sites of a run, from the first join to the end.

    A site is known by the name that its key is registered under; a simulated node has none and says which site it is.
    A site that comes back, also from another node, goes on under its name; where a second key was registered under the
    name, the site has new keys, and the node with the old one is passed over. One that joins late takes part from the
    next attempt on. A node that did not join is asked again two rounds later, then four, up to sixteen, or when it was
    away: its reply may have been lost, or its site made ready.

    Parameters
    ----------
    study : Study
        Its section ``sites`` says how many are needed.
    exchange : Exchange
        How they are asked to join.
    note : Note
        Gets ``joined``, ``left`` and ``resting``, and ``rejected`` where a node may not join.
    needed : int
        Training sites that a round needs.
    """

    def __init__(self, study: Study, exchange: Exchange, note: Note, needed: int) -> None:
        self._study, self._exchange, self._note, self._needed = study, exchange, note, needed
        self._sites: dict[str, SiteState] = {}
        self._refused: dict[int, _Refused] = {}

    @property
    def sites(self) -> Mapping[str, SiteState]:
        """All sites that ever joined, in their fixed order."""
        return self._sites

    @property
    def refusals(self) -> Sequence[Refusal]:
        """Nodes that did not join, and why."""
        return tuple(refused.refusal for refused in self._refused.values())

    def nodes(self, *, held_out: bool) -> dict[str, int]:
        """Return the connected sites that never train, or those that do, in their fixed order."""
        return {n: s.node for n, s in self._sites.items() if s.held_out == held_out and s.node is not None}

    def gather(self, number: int = 0, *, start: bool = False) -> None:
        """Wait until enough training sites are connected, at most ``sites.join-seconds``.

        At the start, the sites that never train are waited for too, and two nodes that say they are the same site are
        an error. Later the one that was there first stays, and the other one is told off.

        Raises
        ------
        RoundError
            Two nodes say that they are the same site.
        NotPreparedError
            No site has images for this study.
        """
        until = time.monotonic() + self._study.sites.join_seconds
        self._refused.clear()  # who could not join may have been made ready
        self.refresh(number, start=start)
        while self._some_are_missing(start=start) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            self.refresh(number, start=start)
        refusals = self.refusals
        if refusals and not self._sites and {r.code for r in refusals} == {NotPreparedError.code}:
            raise NotPreparedError(
                "no site has images prepared for this study: type `wardround-lab prepare STUDY.toml` "
                "(the default study needs no argument)"
            )

    def _some_are_missing(self, *, start: bool) -> bool:
        """Return whether there are fewer nodes than sites wanted; one that may not join is there all the same."""
        away = set(self._study.sites.held_out_names) - set(self.nodes(held_out=True)) if start else set()
        return len(self.nodes(held_out=False)) + len(self._refused) < self._needed + len(away)

    def refresh(self, number: int = 0, *, start: bool = False) -> None:
        """Take note of nodes that came and went; nodes that are new are asked to join.

        Parameters
        ----------
        number : int
            The round that begins.
        start : bool
            The run begins.

        Raises
        ------
        RoundError
            At the start, two nodes say that they are the same site.
        """
        names = _names(self._exchange.grid.get_nodes())
        for name, site in self._sites.items():
            if site.node is not None and site.node not in names:
                site.node, site.reason = None, "not connected"
                self._note("left", site=name)
        self._refused = {node: refused for node, refused in self._refused.items() if node in names}
        known = {site.node for site in self._sites.values()}
        known |= {node for node, refused in self._refused.items() if number < refused.again}
        new = {node: names[node] or f"node {node}" for node in sorted(names) if node not in known}
        for node, name in list(new.items()):
            if list(names.values()).count(name) > 1 and (start or name in self.nodes(held_out=False)):
                self._turn_away(node, name, number, start=start)
                del new[node]
        if not new:
            return
        study = self._study
        instruction = Instruction("join", study.digest)
        outcomes = self._exchange.ask(
            {name: node for node, name in new.items()},
            instruction,
            pack_instruction(instruction),
            size=0,
            dtype=study.wire.dtype,
            seconds=study.sites.deadline_seconds,
        )
        for node, outcome in zip(new, outcomes, strict=True):
            if isinstance(outcome, Refusal):
                self._refuse(node, outcome, number)
                continue
            # An authenticated name is the site's identity; simulated nodes have none and say which site they are.
            name = names[node] or f"hospital-{int(outcome.reply.scalars['site'])}"
            site = self._sites.setdefault(name, SiteState(name in study.sites.held_out_names))
            if site.node is not None:
                self._turn_away(node, name, number, start=start)
                continue
            self._refused.pop(node, None)
            site.node, site.reason = node, ""
            self._note("joined", site=name)
        self._sites = _in_order(self._sites)

    def _turn_away(self, node: int, name: str, number: int, *, start: bool) -> None:
        reason = f"two nodes say that they are {name}: every site has one node"
        if start:
            raise RoundError(reason)
        self._refuse(node, Refusal(f"node {node}", 0, "taken", reason), number)

    def _refuse(self, node: int, refusal: Refusal, number: int) -> None:
        times = self._refused[node].times + 1 if node in self._refused else 1
        self._refused[node] = _Refused(refusal, times, number + min(2**times, _LONGEST_REST_ROUNDS))
        self._note("rejected", site=refusal.site, why=refusal.why, reason=refusal.reason)

    def choose(self, number: int, attempt: int) -> Choice:
        """Return who is asked in an attempt of a round.

        Nobody rests where the round would miss the quorum without them. Who is drawn follows from the study, the round
        and the attempt alone, and from who is there.
        """
        training = {name: site for name, site in self._sites.items() if not site.held_out}
        away = tuple(name for name, site in training.items() if site.node is None)
        here = [name for name in training if name not in away]
        awake = [name for name in here if training[name].rests_until <= number]
        if len(awake) < self._needed:
            awake = here
        asked = awake
        if 0 < self._study.sites.per_round < len(awake):
            seed = sha256_hex(canonical_json(["sample", self._study.digest, number, attempt]))
            generator = np.random.Generator(np.random.Philox(key=int(seed[:32], 16)))
            drawn = generator.choice(len(awake), self._study.sites.per_round, replace=False)
            asked = [awake[i] for i in sorted(drawn)]
        nodes = self.nodes(held_out=False)
        return Choice(
            {name: nodes[name] for name in asked},
            away,
            {name: training[name].rests_until for name in here if name not in awake},
            tuple(name for name in awake if name not in asked),
        )

    def answered(self, name: str, number: int) -> None:
        """Say that a site counted in a round."""
        site = self._sites[name]
        site.failures, site.rests_until, site.last_round, site.reason = 0, 0, number, ""

    def failed(self, refusal: Refusal, number: int) -> None:
        """Say that a site was asked in a round and did not count; one that fails often rests."""
        site = self._sites[refusal.site]
        site.failures, site.reason = site.failures + 1, refusal.reason
        if (over := site.failures - self._study.sites.rest_after) >= 0:
            site.rests_until = number + 1 + min(2**over, _LONGEST_REST_ROUNDS)
            self._note("resting", site=refusal.site, round=number, until=site.rests_until, failures=site.failures)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to know of the sites, as JSON."""
        return {name: {k: v for k, v in asdict(site).items() if k != "node"} for name, site in self._sites.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`; all sites are away until they join again."""
        self._sites = _in_order({name: SiteState(**known) for name, known in state.items()})


def _names(nodes: Iterable[NodeInfo]) -> dict[int, str]:
    """Return the registered names by node. Of those with one name the last that was registered counts."""
    infos = list(nodes)
    last: dict[str, str] = {}
    for info in infos:
        last[info.name] = max(last.get(info.name, ""), info.registered_at)
    return {info.node_id: info.name for info in infos if not info.name or info.registered_at == last[info.name]}


def _in_order(sites: Mapping[str, SiteState]) -> dict[str, SiteState]:
    return {name: sites[name] for name in sorted(sites, key=natural)}

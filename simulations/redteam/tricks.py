"""A coordinator that plays tricks: messages that no study sends, to the real client of a virtual hospital."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.session import first_theta
from common.contract import Instruction, Kind, Vector, pack_instruction, theta_digest
from common.errors import ContractError, ThetaError
from common.meta import flatten
from common.study import Study
from simulations.engines.inprocess import InProcessGrid
from simulations.redteam.scene import copies

__all__ = ["Trick", "play"]

_TYPES = {"join": "query.join", "train": "train", "evaluate": "evaluate"}


@dataclass(frozen=True)
class Trick:
    """What the coordinator tried, with which code it must be refused, and what came back: 0 is an answer."""

    name: str
    wanted: int
    code: int

    @property
    def refused(self) -> bool:
        """Whether it was refused with the code that it must be."""
        return self.code == self.wanted


def play(study: Study) -> list[Trick]:
    """Play every trick to the first hospital of a study with a guarantee; it is a copy, whose ledger is thrown away.

    The outer optimiser is Adam, whatever the study's is: with it, every theta has a bound.
    """
    study = study.override({"outer.optimiser": "adam", "outer.momentum": 0.0})
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
    with copies(study):
        return list(_played(_Coordinator(study)))


@dataclass(frozen=True)
class _Coordinator:
    study: Study

    @property
    def first(self) -> Vector:
        theta: Vector = flatten(first_theta(self.study)).numpy()
        return theta

    def ask(
        self,
        kind: Kind,
        number: int = 1,
        theta: Vector | None = None,
        *,
        run: Study | None = None,
        message: str = "",
        change: Callable[[RecordDict], object] = lambda _: None,
    ) -> int:
        """Send a message and return the code that comes back, 0 for an answer."""
        instruction = Instruction("join", self.study.digest)
        sent = None
        if kind != "join":
            sent = self.first if theta is None else theta
            shapes = {name: tuple(tensor.shape) for name, tensor in first_theta(self.study).items()}
            instruction = replace(instruction, kind=kind, round=number, attempt=1, theta=theta_digest(sent, shapes))
        content = pack_instruction(instruction, sent)
        change(content)
        grid = InProcessGrid(app, (run or self.study).run_config(), self.study.data.sites)
        (asked,) = grid.push_messages([Message(content, next(iter(grid.get_node_ids())), message or _TYPES[kind])])
        (answer,) = grid.pull_messages([asked])
        return answer.error.code if answer.has_error() else 0


def _played(coordinator: _Coordinator) -> Iterator[Trick]:
    study, ask, theta = coordinator.study, coordinator.ask, coordinator.first
    rate, contract, trap = np.float32(study.outer.rate), ContractError.code, ThetaError.code

    def aside(by: Any) -> Vector:
        out = theta.copy()
        out[0] += by
        return out

    def with_roster(content: RecordDict) -> None:
        content["roster"] = ConfigRecord({"sites": "hospital-0"})

    yield Trick("join, as it should be", 0, ask("join"))
    weaker = study.override({"privacy.noise": study.privacy.noise / 100})
    yield Trick("less noise than the study has", contract, ask("train", run=weaker))
    yield Trick("a roster of its own", contract, ask("train", change=with_roster))
    yield Trick("a first theta of its own", trap, ask("train", 1, aside(1e-3)))
    yield Trick("weights that are not finite", contract, ask("train", 2, aside(np.nan)))
    yield Trick("weights that no training leads to", trap, ask("train", study.study.rounds, aside(1e6)))
    yield Trick("round 1, as it should be", 0, ask("train", 1))
    yield Trick("round 3, as it should be", 0, ask("train", 3))
    yield Trick("a jump from one round to the next", trap, ask("train", 4, aside(2.5 * rate)))
    yield Trick("a round again with another theta", contract, ask("train", 3, aside(rate / 2)))
    yield Trick("an older round", contract, ask("train", 2))
    yield Trick(
        "a round again with another theta, after joining", contract, ask("join") or ask("train", 3, aside(rate / 2))
    )
    yield Trick("a round that the study has not", contract, ask("train", study.study.rounds + 1))
    yield Trick("training in a message to evaluate", contract, ask("train", 4, message="evaluate"))
    yield Trick("figures that the study withholds", contract, ask("evaluate", 1))

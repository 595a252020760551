"""Sites that answer at once with known numbers: the real server and the real wire, no images and no network."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.contract import EVALUATION, Instruction, Vector, check_instruction, pack_reply
from common.meta import flatten
from common.study import Study
from server.record import RunRecord, run_folder
from server.rounds import initial_theta, run_study
from simulations.engines.inprocess import Fault, InProcessGrid
from tests.client.hospitals import enter_run, tiny_study

__all__ = ["Scripted", "Spoil", "a_grid", "a_study", "events", "history", "run", "vector_of"]

#: Changes a site's answer: gets the site's number, the instruction and the content, returns another content, or a
#: whole reply made from the message.
Spoil = Callable[[int, Instruction, RecordDict, Message], RecordDict | Message]


def a_study(changes: Mapping[str, bool | int | float | str] | None = None) -> Study:
    """Return a study of three training sites and a held-out one, with a theta of few numbers."""
    return tiny_study({"model.width": 1, "sites.deadline-seconds": 20.0, **(changes or {})})


def vector_of(site: int, number: int, size: int) -> Vector:
    """Return what a scripted site answers in a round."""
    return np.random.default_rng([site, number]).normal(0, 1, size).astype(np.float32)


class Scripted(ClientApp):
    """Answers every instruction that passes the contract; ``spoil`` may change an answer."""

    def __init__(self, study: Study, spoil: Spoil | None = None) -> None:
        super().__init__()
        self.study, self.spoil = study, spoil
        self.size = flatten(initial_theta(study)).numel()
        self.asked: list[tuple[int, Instruction]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        site = int(str(context.node_config["partition-id"]))
        digest = Study.from_run_config(context.run_config).digest
        instruction, _ = check_instruction(message.content, study=digest, size=self.size, dtype="float32")
        self.asked.append((site, instruction))
        content = self.answer(site, instruction)
        changed = self.spoil(site, instruction, content, message) if self.spoil else content
        return changed if isinstance(changed, Message) else Message(changed, reply_to=message)

    def answer(self, site: int, instruction: Instruction) -> RecordDict:
        if instruction.kind == "join":
            return pack_reply(instruction, {"site": site})
        if instruction.kind == "train":
            scalars = {"loss": 1.0 + site, "accuracy": 0.1 * (site + 1)}
            return pack_reply(instruction, scalars, vector_of(site, instruction.round, self.size))
        figures = dict.fromkeys(EVALUATION, -1.0) | {"known.after.mean": 0.5, "known.after.error": 0.1 * site}
        return pack_reply(instruction, figures)


def a_grid(study: Study, *, spoil: Spoil | None = None, fault: Fault | None = None, **more: Any) -> InProcessGrid:
    return InProcessGrid(Scripted(study, spoil), study.run_config(), study.data.sites, fault, **more)


def run(study: Study, grid: InProcessGrid, run_id: int, said: list[str] | None = None) -> RunRecord:
    """Run a study on a grid and return its record."""
    enter_run()
    record = RunRecord(run_folder(run_id), study)
    run_study(grid, study, record, (said if said is not None else []).append)
    return record


def history(record: RunRecord) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (record.folder / "history.jsonl").read_text().splitlines()]


def events(record: RunRecord, *names: str) -> list[dict[str, Any]]:
    """Return the events of some kinds."""
    lines = [json.loads(line) for line in (record.folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] in names]

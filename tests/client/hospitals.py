"""Small hospitals for tests: four sites from arrays made on the fly, and messages to their ClientApp."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.data.store import Site
from common.contract import Instruction, Side, Vector, pack_instruction, theta_digest
from common.meta import flatten
from common.study import Study
from server.rounds import initial_theta
from simulations.engines.inprocess import InProcessGrid, transmit
from simulations.prepare import prepare

SITES = 4
CLASSES = ("a", "b", "c", "d", "e", "f")
SOURCE = "npz:~/wardround-tiny.npz"  # no path of its own: the digest of the data stays the same between runs

_TYPES = {"join": "query.join", "train": "train", "evaluate": "evaluate"}

_TINY: Mapping[str, bool | int | float | str] = {
    "study.id": "tiny",
    "study.rounds": 2,
    "sites.join-seconds": 5.0,
    "sites.deadline-seconds": 60.0,
    "model.width": 4,
    "model.image-size": 16,
    "algorithm.test-steps": 1,
    "outer.clip": 0.0,
    "episodes.classes": "a,b,c,d",
    "episodes.held-out": "e,f",
    "episodes.ways": 3,
    "episodes.shots": 2,
    "episodes.queries": 2,
    "episodes.per-round": 2,
    "episodes.test-episodes": 2,
    "episodes.scratch-steps": 1,
    "data.source": SOURCE,
    "data.sites": SITES,
    "data.test-fraction": 0.5,
}


def enter_run() -> None:
    """Let messages be made outside of Flower: each belongs to a run."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1


def tiny_study(changes: Mapping[str, bool | int | float | str] | None = None) -> Study:
    """Return a study of four hospitals (hospital-3 never trains) whose network has some hundred numbers."""
    return Study.from_run_config({**_TINY, **(changes or {})})


def prepared(study: Study) -> list[Site]:
    """Return a tiny study's opened sites, written if they are not there yet."""
    path = Path(SOURCE.removeprefix("npz:")).expanduser()
    if not path.exists():
        generator = np.random.default_rng(7)
        # Sites, classes, patients, images of each. So many patients that any split has some on both sides; and
        # every training site lacks one of the classes.
        axes = np.indices((SITES, len(CLASSES), 16, 2)).reshape(4, -1)
        site, label, patient, _ = axes[:, (axes[0] != axes[1]) | (axes[0] == SITES - 1)]
        rows, columns = np.indices((16, 16))
        pattern = np.stack([np.sin(rows * (k + 1) / 5) * np.cos(columns * (6 - k) / 5) for k in range(len(CLASSES))])
        images = 128 + 60 * pattern[label] + 12 * site[:, None, None] + generator.normal(0, 20, (len(label), 16, 16))
        np.savez(
            path,
            images=images.clip(0, 255).astype(np.uint8),
            labels=label,
            sites=site,
            groups=[f"{s}/{c}/{p}" for s, c, p in zip(site, label, patient, strict=True)],
            label_names=CLASSES,
        )
    return prepare(study)


def instruct(
    study: Study, kind: Any, *, number: int = 1, scratch: bool = False, side: Side = "test"
) -> tuple[Instruction, Vector | None]:
    """Return an instruction at a study's initial theta, and that theta where the instruction carries one."""
    if kind == "join":
        return Instruction("join", study.digest), None
    layout = initial_theta(study)
    theta = flatten(layout).numpy()
    digest = theta_digest(theta, {name: tuple(t.shape) for name, t in layout.items()})
    return Instruction(kind, study.digest, number, 1, digest, scratch, side), theta


def ask(
    study: Study,
    site: int,
    instruction: Instruction,
    theta: Vector | None,
    *,
    client: ClientApp = app,
    run_config: Mapping[str, Any] | None = None,
    message_type: str = "",
) -> Message:
    """Return what a site answers, after its way over the wire in both directions."""
    grid = InProcessGrid(client, study.run_config() if run_config is None else run_config, SITES)
    content = pack_instruction(instruction, theta)
    node = list(grid.get_node_ids())[site]
    (message_id,) = grid.push_messages([Message(content, node, message_type or _TYPES[instruction.kind])])
    (reply,) = grid.pull_messages([message_id])
    return reply


def objects(message: Message) -> dict[str, list[bytes]]:
    """Return everything that crosses the wire for a message: the type of each object, and their bytes."""
    found: dict[str, list[bytes]] = {}
    for value in get_all_nested_objects(message).values():
        found.setdefault(type(value).__name__, []).append(value.deflate())
    return found


def wire_bytes(message: Message) -> bytes:
    """Return all bytes that cross the wire for a message, and those of its metadata as they arrive."""
    return b"\0".join(part for parts in objects(message).values() for part in parts) + repr(transmit(message)).encode()

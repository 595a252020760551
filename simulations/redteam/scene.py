"""A run through the real apps, every training message kept: what an honest but curious coordinator holds afterwards."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from client.session import Session, open_session, virtual_site
from common.contract import Instruction, Vector, check_instruction, check_reply
from common.errors import RoundError
from common.meta import flatten, unflatten
from common.models.network import Network
from common.paths import home
from common.study import Study
from server.record import run_folder
from simulations.engines.inprocess import run_in_process
from simulations.prepare import prepare

__all__ = ["Release", "Scene", "copies", "record"]


@dataclass(frozen=True, eq=False)
class Release:
    """One answer of one site, and the theta that it was asked at; the same only as itself.

    Attributes
    ----------
    site, round : int
        Whose, and to which round.
    theta, vector : ndarray
        ``[D]``, as they were on the wire.
    """

    site: int
    round: int
    theta: Vector
    vector: Vector


@dataclass(frozen=True)
class Scene:
    """A study that has run.

    Attributes
    ----------
    releases : tuple of Release
        All answers, in the order of their rounds and sites.
    sessions : tuple of Session
        The sites from inside. Attacks see nothing of them but the network; the oracle sees all.
    theta : dict of str to Tensor
        What the run published.
    """

    study: Study
    releases: tuple[Release, ...]
    sessions: tuple[Session, ...]
    theta: dict[str, torch.Tensor]

    @property
    def network(self) -> Network:
        """The study's network: its structure, not its numbers."""
        return self.sessions[0].engine.network

    def named(self, vector: Vector) -> dict[str, torch.Tensor]:
        """Return a vector ``[D]`` as theta's tensors by name, in float64."""
        return unflatten(torch.tensor(vector, dtype=torch.float64), self.sessions[0].theta)


class _Recorder(ClientApp):
    """The real ClientApp, and an ear on the line."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int, Message, Message]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        from client.app import app as client_app

        reply = client_app(message, context)
        if message.metadata.message_type == "train" and not reply.has_error():
            self.heard.append((int(str(context.node_config["partition-id"])), message, reply))
        return reply


def record(study: Study) -> Scene:
    """Run a study on its virtual sites and keep what was sent.

    The sites that run are copies: what the attacks spend is not in the ledgers of the originals, and a study that was
    attacked once gets noise of its own when it is attacked again.

    Raises
    ------
    RoundError
        No site answered.
    """
    recorder = _Recorder()
    with copies(study), redirect_stdout(StringIO()):  # a line a round
        run_id, _ = run_in_process(study, client=recorder)
        published = load_file(run_folder(run_id) / "theta.safetensors")
    config = study.run_config()
    sessions = tuple(open_session(config, {"partition-id": site}) for site in range(study.data.sites))
    example = flatten(sessions[0].theta).numpy()
    thetas: dict[str, Vector] = {}  # the same one for all sites of a round: kept once
    releases = []
    for site, message, reply in recorder.heard:
        fields: dict[str, Any] = dict(message.content.config_records["instruction"])
        instruction = Instruction(**fields)
        if instruction.theta not in thetas:
            _, theta = check_instruction(
                message.content, study=study.digest, size=example.size, dtype=str(example.dtype)
            )
            assert theta is not None  # a message to train holds one
            thetas[instruction.theta] = theta
        vector = check_reply(reply.content, instruction, size=example.size, dtype=str(example.dtype)).vector
        assert vector is not None
        releases.append(Release(site, instruction.round, thetas[instruction.theta], vector))
    if not releases:
        raise RoundError("no site answered a single round: there is nothing to attack")
    return Scene(study, tuple(sorted(releases, key=lambda r: (r.round, r.site))), sessions, published)


@contextmanager
def copies(study: Study) -> Iterator[None]:
    """Let a study's virtual sites be copies, without what the originals have spent and were shown."""
    originals = [site.folder for site in prepare(study)]
    with _a_home_of_its_own():
        for number, folder in enumerate(originals):
            books = shutil.ignore_patterns("ledger*", "*.log", "thetas")
            shutil.copytree(folder, virtual_site(study, number), ignore=books)
        yield


@contextmanager
def _a_home_of_its_own() -> Iterator[None]:
    before, released = os.environ.get("WARDROUND_HOME"), home() / "released"
    with tempfile.TemporaryDirectory(prefix="wardround-redteam-", ignore_cleanup_errors=True) as folder:
        os.environ["WARDROUND_HOME"] = str(Path(folder))
        if released.is_dir():  # thetas that studies start from
            (home() / "released").symlink_to(released.resolve(), target_is_directory=True)
        try:
            yield
        finally:
            if before is None:
                del os.environ["WARDROUND_HOME"]
            else:
                os.environ["WARDROUND_HOME"] = before

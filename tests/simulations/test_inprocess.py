"""The real apps over the in-process grid: federated equals centralised, bit for bit again, and what went over the wire.

The oracle of the first is one process that holds all sites' episodes: one engine over their union, one plain Adam.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from client import session as client_session
from client.app import app as client_app
from client.data.episodes import draw
from client.data.store import Site
from client.session import open_session
from common.contract import EVALUATION, check_instruction, pack_instruction, pack_reply
from common.meta import Batch, Engine, Episodes, flatten, head_size, make_learner, unflatten
from common.models import build
from common.study import ALGORITHMS, Study
from server import rounds
from server.outer import OuterOptimiser
from server.record import run_folder
from server.rounds import initial_theta
from simulations.engines.inprocess import InProcessGrid, run_in_process, transmit
from tests.client.hospitals import enter_run, instruct, prepared, tiny_study

SEQUENTIAL = {"fedavg", "fedprox"}  # one trajectory through a site's episodes; the sites' results are averaged


@pytest.fixture(scope="module")
def study() -> Study:
    return tiny_study()


@pytest.fixture(scope="module")
def sites(study: Study) -> list[Site]:
    return prepared(study)


class TrainOnly(ClientApp):
    """The real ClientApp, but evaluation costs nothing: it says that the site has no figures."""

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != "evaluate":
            return client_app(message, context)
        study = Study.from_run_config(context.run_config)
        size, dtype = flatten(initial_theta(study)).numel(), study.wire.dtype
        instruction, _ = check_instruction(message.content, study=study.digest, size=size, dtype=dtype)
        return Message(pack_reply(instruction, dict.fromkeys(EVALUATION, -1.0)), reply_to=message)


class Recorder(ClientApp):
    """The real ClientApp; keeps what it was asked and what it answered, as the other side received it."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges: list[tuple[Message, Message]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        self.exchanges.append((message, transmit(reply)[0]))
        return reply


def outcome(run_id: int) -> tuple[bytes, bytes]:
    """Return the bytes that two equal runs share: theta, and the result."""
    folder = run_folder(run_id)
    return (folder / "theta.safetensors").read_bytes(), (folder / "result.json").read_bytes()


def joined(parts: list[Episodes]) -> Episodes:
    """Return the union of some episodes."""

    def side(batches: list[Batch]) -> Batch:
        masks = [torch.ones_like(b.y, dtype=torch.bool) if b.mask is None else b.mask for b in batches]
        return Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]), torch.cat(masks))

    support, query = side([p.support for p in parts]), side([p.query for p in parts])
    return Episodes(support, query, torch.cat([p.classes for p in parts]))


def central_gradient(study: Study, theta: Mapping[str, Tensor], number: int) -> Tensor:
    """Return what one process with the episodes of all training sites computes in a round."""
    network = build(study.model, classes=head_size(study.algorithm, study.episodes), seed=0, dtype=torch.float64)
    engine = Engine(make_learner(study.algorithm), network)
    parts = []
    for index in range(3):
        site = open_session(study.run_config(), {"partition-id": index})
        spec, pool = study.episodes, site.training_pool()
        generator = site.site.generator("train", study.digest, number)
        parts.append(draw(site.site, pool, spec, spec.per_round, generator, augment=True))
    if study.algorithm.name in SEQUENTIAL:
        return torch.stack([engine.meta_gradient(theta, part).gradient for part in parts]).mean(0)
    return engine.meta_gradient(theta, joined(parts)).gradient


def relative_error(ours: NDArray[Any] | Tensor, truth: NDArray[Any] | Tensor) -> float:
    difference = np.abs(np.asarray(ours) - np.asarray(truth)).max()
    return float(difference / np.abs(np.asarray(truth)).max())


def float64_study(name: str) -> Study:
    """Four ways are more classes than any training site has: the episodes have fewer ways, and padding."""
    changes: dict[str, bool | int | float | str] = {
        "algorithm.name": name,
        "wire.dtype": "float64",
        "episodes.ways": 4,
        "episodes.shots": 3,
        "episodes.augment": "class",
        "algorithm.inner-steps": 2,
    }
    return tiny_study(changes)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "local-only"])
def test_federated_equals_centralised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = float64_study(name)
    prepared(study)
    aggregates: list[NDArray[np.float64]] = []

    class Spy(OuterOptimiser):
        def step(self, gradient: NDArray[np.float64]) -> None:
            aggregates.append(gradient.copy())
            super().step(gradient)

    monkeypatch.setattr(rounds, "OuterOptimiser", Spy)
    run_id, _ = run_in_process(study, client=TrainOnly())

    theta = {key: t.clone().requires_grad_() for key, t in initial_theta(study).items()}
    optimiser = torch.optim.Adam(theta.values(), lr=study.outer.rate)
    for number in (1, 2):
        gradient = central_gradient(study, {key: t.detach() for key, t in theta.items()}, number)
        assert gradient.abs().max() > 1e-3
        assert relative_error(aggregates[number - 1], gradient) < 1e-10
        for key, part in unflatten(gradient, theta).items():
            theta[key].grad = part.clone()
        optimiser.step()
    result = load_file(run_folder(run_id) / "theta.safetensors")
    assert {key: t.shape for key, t in result.items()} == {key: t.shape for key, t in theta.items()}
    ours = flatten({key: result[key] for key in theta})
    assert relative_error(ours, flatten(theta).detach()) < 1e-10
    assert relative_error(ours, flatten(initial_theta(study))) > 1e-4


def test_the_comparison_has_ragged_episodes_of_fewer_ways() -> None:
    study = float64_study("maml")
    prepared(study)
    for index in range(3):
        site = open_session(study.run_config(), {"partition-id": index})
        pool = site.training_pool()
        episodes = draw(site.site, pool, study.episodes, 2, site.site.generator("test"))
        assert episodes.support.mask is not None
        assert not episodes.support.mask.all()
        assert (episodes.classes == -1).any()


def test_local_only_shares_nothing() -> None:
    study = tiny_study({"algorithm.name": "local-only"})
    prepared(study)
    run_id, grid = run_in_process(study, client=TrainOnly())
    assert {kind for _, kind, _, _ in grid.traffic} == {"query.join", "evaluate"}
    theta = load_file(run_folder(run_id) / "theta.safetensors")
    for name, start in initial_theta(study).items():
        torch.testing.assert_close(theta[name], start, rtol=0, atol=0)


def test_the_same_study_gives_the_same_bits_whatever_the_workers(
    study: Study, sites: list[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for cores in (1, 2):
        monkeypatch.setattr(client_session, "cpu_cores", lambda cores=cores: cores)
        client_session._session.cache_clear()
        client_session._engines.cache_clear()
        run_id, _ = run_in_process(study)
        outcomes.append(outcome(run_id))
    assert outcomes[0] == outcomes[1]
    other, _ = run_in_process(study.override({"study.seed": 1, "study.rounds": 1}), client=TrainOnly())
    assert outcome(other)[0] != outcomes[0][0]


def test_what_a_run_sends(study: Study, sites: list[Site]) -> None:
    recorder = Recorder()
    run_id, grid = run_in_process(study.override({"study.rounds": 1}), client=recorder)
    sent = [(site, kind) for site, kind, _, _ in grid.traffic]
    assert sent == [
        *((site, "query.join") for site in range(4)),
        *((site, "train") for site in range(3)),  # hospital-3 is held out
        *((site, "evaluate") for site in range(4)),
    ]
    for question, answer in recorder.exchanges:
        assert answer.metadata.reply_to_message_id == question.metadata.message_id
        assert not answer.has_error()
    sizes = {kind: (down, up) for _, kind, down, up in grid.traffic}
    numbers = flatten(initial_theta(study)).numel()
    assert sizes["train"][0] > 4 * numbers  # theta goes down and a vector of the same size comes up
    assert 4 * numbers < sizes["train"][1] < 4 * numbers + 4096
    assert sizes["evaluate"][1] < 4096  # evaluation returns figures only
    assert sizes["query.join"][0] < 4096
    assert (run_folder(run_id) / "result.json").exists()
    # What sites compute is time that the coordinator waits for them, not time of transport.
    (line,) = map(json.loads, (run_folder(run_id) / "history.jsonl").read_text().splitlines())
    assert 0 < line["waiting_seconds"] < grid.computing_seconds


def test_pulling_runs_one_site_at_a_time(study: Study, sites: list[Site]) -> None:
    enter_run()
    ran: list[int] = []

    def fault(site: int, message: Message) -> str | int | None:
        ran.append(site)
        return (1, "drop", "crash", None)[site]

    grid = InProcessGrid(client_app, study.run_config(), 4, fault)
    instruction, _ = instruct(study, "join")
    nodes = grid.get_node_ids()
    ids = list(grid.push_messages([Message(pack_instruction(instruction), n, "query.join") for n in nodes]))
    assert ran == []
    assert list(grid.pull_messages(ids[3:])) != []  # only what is asked for
    assert ran == [3]
    (crashed,) = grid.pull_messages(ids[:3])
    assert ran == [3, 0, 1, 2]
    assert crashed.has_error()
    assert crashed.metadata.reply_to_message_id == ids[2]
    delayed = [list(grid.pull_messages(ids[:2])) for _ in range(3)]
    assert [len(replies) for replies in delayed] == [0, 1, 0]  # late, once; the dropped one never
    assert ran == [3, 0, 1, 2]

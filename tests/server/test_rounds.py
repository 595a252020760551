"""The round loop against scripted sites: what counts, what does not, and who is named with which reason."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, RecordDict
from safetensors.torch import load_file

from common.contract import Instruction, Vector
from common.errors import DataError, NotPreparedError, RoundError
from common.meta import flatten, unflatten
from common.study import Study
from server import rounds
from server.aggregation import Mean, aggregator
from server.record import RunRecord, run_folder
from server.rounds import initial_theta
from simulations.engines.inprocess import Fault, InProcessGrid, run_in_process
from tests.client.hospitals import tiny_study
from tests.server.scripted import Scripted, Spoil, a_grid, a_study, events, history, run, vector_of

RUNS = itertools.count(10**6)
PATIENT = "Kowalska^Zofia"


def result(record: RunRecord) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((record.folder / "result.json").read_text())
    return answer


def theta_of(record: RunRecord, study: Study) -> Vector:
    tensors = load_file(record.folder / "theta.safetensors")
    vector: Vector = flatten({name: tensors[name] for name in initial_theta(study)}).numpy()
    return vector


def by_hand(study: Study, sites_of_round: list[list[int]]) -> Vector:
    """Return theta after some rounds: a plain Adam over separate tensors, and the mean of the sites that count."""
    theta = {name: t.clone().requires_grad_() for name, t in initial_theta(study).items()}
    optimiser = torch.optim.Adam(theta.values(), lr=study.outer.rate)
    size = flatten(theta).numel()
    for number, sites in enumerate(sites_of_round, 1):
        mean = np.mean([vector_of(site, number, size).astype(np.float64) for site in sites], axis=0)
        for name, part in unflatten(torch.from_numpy(mean.astype(np.float32)), theta).items():
            theta[name].grad = part.clone()
        optimiser.step()
    vector: Vector = flatten(theta).detach().numpy()
    return vector


def assert_same(ours: Vector, truth: Vector) -> None:
    assert ours.dtype == truth.dtype
    np.testing.assert_allclose(ours, truth, rtol=0, atol=2e-7)


# What counts


def test_theta_is_that_of_one_adam_over_the_whole_run() -> None:
    study = a_study({"study.rounds": 3})
    record = run(study, a_grid(study), next(RUNS))
    kept = by_hand(study, [[0, 1, 2]] * 3)
    assert_same(theta_of(record, study), kept)
    # An optimiser made anew every round would end elsewhere.
    forgetful = flatten(initial_theta(study)).numpy().copy()
    for number in (1, 2, 3):
        mean = np.mean([vector_of(site, number, len(forgetful)) for site in range(3)], axis=0)
        forgetful -= study.outer.rate * np.sign(mean)
    assert np.abs(theta_of(record, study) - forgetful).max() > 1e-4


def test_a_round_leaves_a_line_and_a_run_its_result() -> None:
    study = a_study()
    said: list[str] = []
    record = run(study, a_grid(study), next(RUNS), said)
    lines = history(record)
    size = flatten(initial_theta(study)).numel()
    for number, line in enumerate(lines, 1):
        assert line["round"] == number
        assert line["sites"] == {f"hospital-{i}": {"loss": 1.0 + i, "accuracy": 0.1 * (i + 1)} for i in range(3)}
        assert line["out"] == []
        assert (line["bytes_up"], line["bytes_down"]) == (3 * 4 * size, 3 * 4 * size)
        mean = np.mean([vector_of(site, number, size).astype(np.float64) for site in range(3)], axis=0)
        assert line["gradient_norm"] == pytest.approx(np.linalg.norm(mean))
        assert line["seconds"] >= 0
    answer = result(record)
    assert (answer["study"], answer["rounds"], answer["numbers_up_per_reply"]) == (study.digest, 2, size)
    (scores,) = answer["evaluations"]
    assert scores["round"] == 2
    assert set(scores["sites"]) == {f"hospital-{i}" for i in range(4)}
    assert scores["sites"]["hospital-1"] == {"known.after.mean": 0.5, "known.after.error": 0.1}  # no -1
    assert json.loads((record.folder / "study.json").read_text()) == {
        "digest": study.digest,
        "study": study.run_config(),
    }
    assert any("no formal guarantee" in line for line in said)
    assert any("round 2/2" in line and "worst hospital-0 0.100" in line for line in said)


def test_evaluation_in_between_asks_for_no_training_from_scratch() -> None:
    study = a_study({"study.rounds": 4, "episodes.test-every": 2})
    grid = a_grid(study)
    record = run(study, grid, next(RUNS))
    assert [scores["round"] for scores in result(record)["evaluations"]] == [2, 4]
    assert isinstance(grid.client, Scripted)
    asked = [(i.round, site) for site, i in grid.client.asked if i.kind == "evaluate" and i.scratch]
    assert {number for number, _ in asked} == {4}
    assert 3 in {site for _, site in asked}
    assert {site for site, i in grid.client.asked if i.kind == "train"} == {0, 1, 2}  # never the held-out one


def test_the_aggregate_does_not_depend_on_the_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    study = a_study()
    orders: list[list[bytes]] = []
    thetas = []

    class Spy(Mean):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            orders.append([])

        def add(self, vector: Vector, weight: float = 1.0) -> None:
            orders[-1].append(vector.tobytes())
            super().add(vector, weight)

    monkeypatch.setattr(aggregator, "Mean", Spy)
    for delays in ((0, 0, 0), (3, 2, 1), (0, 4, 1)):

        def fault(site: int, message: Message, delays: tuple[int, ...] = delays) -> int | None:
            return delays[site] if message.metadata.message_type == "train" else None

        record = run(study, a_grid(study, fault=fault), next(RUNS))
        thetas.append((record.folder / "theta.safetensors").read_bytes())
    assert len(set(thetas)) == 1
    size = flatten(initial_theta(study)).numel()
    for number, added in enumerate(filter(None, orders)):
        assert added == [vector_of(site, number % 2 + 1, size).tobytes() for site in range(3)]


def test_sites_are_in_natural_order_under_their_authenticated_names() -> None:
    study = a_study({"sites.held-out": "ward 2", "data.sites": 5, "study.rounds": 1})
    names = ["ward 10", "ward 9", "ward 2", "ward 1", "annex"]  # what a site says of itself does not count
    grid = a_grid(study, names=names)
    record = run(study, grid, next(RUNS))
    (line,) = history(record)
    assert set(line["sites"]) == {"ward 10", "ward 9", "ward 1", "annex"}
    assert line["sites"]["ward 10"]["loss"] == 1.0
    assert isinstance(grid.client, Scripted)
    assert [site for site, i in grid.client.asked if i.kind == "train"] == [4, 3, 1, 0]  # annex, wards 1, 9 and 10


# Who is out


def out_in_round_one(fault: Fault | None, spoil: Spoil | None, **changes: Any) -> tuple[RunRecord, Study, list[str]]:
    study = a_study(changes)
    said: list[str] = []
    record = run(study, a_grid(study, fault=fault, spoil=spoil), next(RUNS), said)
    return record, study, said


def in_training(what: str | int) -> Fault:
    """Return a fault of site 1 whenever it trains in the first round."""
    seen: list[int] = []

    def fault(site: int, message: Message) -> str | int | None:
        if site != 1 or message.metadata.message_type != "train":
            return None
        seen.append(site)
        return what if len(seen) == 1 else None

    return fault


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(rounds, "_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("what", "code", "why", "reason"),
    [
        ("drop", 0, "no-reply", "no reply before the deadline"),
        (10**9, 0, "no-reply", "no reply before the deadline"),
        ("crash", 5, "error", "the site went away"),
    ],
)
def test_a_site_that_fails_is_named_and_the_round_goes_on(what: str | int, code: int, why: str, reason: str) -> None:
    record, study, said = out_in_round_one(in_training(what), None, **{"sites.deadline-seconds": 0.5})
    one, two = history(record)
    assert one["out"] == [{"site": "hospital-1", "code": code, "why": why, "reason": reason}]
    assert set(one["sites"]) == {"hospital-0", "hospital-2"}
    assert two["out"] == []
    assert_same(theta_of(record, study), by_hand(study, [[0, 2], [0, 1, 2]]))
    assert any(f"out: hospital-1 ({reason})" in line for line in said)


def test_of_a_sites_error_only_the_code_and_the_incident_are_kept() -> None:
    def spoil(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict | Message:
        reasons = {0: "incident 0123abcd", 1: f"incident 0123abcd of {PATIENT}"}
        if instruction.kind == "train" and instruction.round == 1 and site in reasons:
            return Message(Error(DataError.code, reasons[site]), reply_to=message)
        return content

    record, _, said = out_in_round_one(None, spoil, **{"sites.quorum": 1})
    known, unknown = history(record)[0]["out"]
    meaning = "images or labels cannot be read, or cannot give the episodes that a study asks for"
    assert known == {"site": "hospital-0", "code": 104, "why": "error", "reason": f"{meaning} (incident 0123abcd)"}
    assert unknown == {"site": "hospital-1", "code": 104, "why": "error", "reason": meaning}
    assert PATIENT not in "".join(said) + (record.folder / "history.jsonl").read_text()


def test_a_site_that_cannot_evaluate_is_named() -> None:
    def spoil(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict | Message:
        if instruction.kind == "evaluate" and site in {1, 3}:
            return Message(Error(DataError.code, "incident 0123abcd"), reply_to=message)
        return content

    record, _, _ = out_in_round_one(None, spoil)
    (scores,) = result(record)["evaluations"]
    assert set(scores["sites"]) == {"hospital-0", "hospital-2"}
    assert set(scores["out"]) == {"hospital-1", "hospital-3"}
    assert "incident 0123abcd" in scores["out"]["hospital-3"]


def test_below_quorum_the_run_ends_and_says_why() -> None:
    def fault(site: int, message: Message) -> str | None:
        train = message.metadata.message_type == "train"
        return {0: "drop", 2: "crash"}.get(site) if train else None

    study = a_study({"sites.deadline-seconds": 0.5})
    number = next(RUNS)
    with pytest.raises(RoundError) as error:
        run_in_process(study, client=Scripted(study), fault=fault, run_id=number)
    text = str(error.value)
    assert "1 training sites gave a valid reply in round 1, sites.quorum is 2" in text
    assert "hospital-0: no reply before the deadline" in text
    assert "hospital-2: the site went away" in text
    assert "hospital-1" not in text
    assert (run_folder(number) / "failure.txt").read_text() == text
    assert not (run_folder(number) / "result.json").exists()
    assert (run_folder(number) / "history.jsonl").read_text() == ""
    assert where_sites_stand(number) == [("out", None), ("in", 1), ("out", None)]


def where_sites_stand(number: int) -> list[tuple[str, int | None]]:
    """Return each training site's state, and the last round that it counted in, as the status has it at the end."""
    sites = json.loads((run_folder(number) / "status.json").read_text())["sites"]
    return [(sites[f"hospital-{i}"]["state"], sites[f"hospital-{i}"]["last_round"]) for i in range(3)]


def test_at_its_end_the_status_has_the_last_round() -> None:
    study = a_study({"study.rounds": 3, "sites.deadline-seconds": 0.5})

    def fault(site: int, message: Message) -> str | None:
        train = message.metadata.message_type == "train"
        return "crash" if train and site == 1 and message.content["instruction"]["round"] == 3 else None

    number = next(RUNS)
    run_in_process(study, client=Scripted(study), fault=fault, run_id=number)
    assert where_sites_stand(number) == [("in", 3), ("out", 2), ("in", 3)]


# Late, replayed, unsent


class Careless(InProcessGrid):
    """Hands over the replies of an earlier round to whoever asks next, whatever was asked for."""

    handed_over = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._earlier = list(self._delayed)
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        late = [self._delayed.pop(key)[1] for key in self._earlier if key in self._delayed]
        self.handed_over += len(late)
        return [*late, *super().pull_messages(message_ids)]


def test_a_late_reply_of_an_earlier_round_never_counts() -> None:
    study = a_study({"sites.deadline-seconds": 0.5})
    grid = Careless(Scripted(study), study.run_config(), study.data.sites, in_training(10**9))
    record = run(study, grid, next(RUNS))
    assert grid.handed_over == 1
    assert [(e["site"], e["round"], e["attempt"]) for e in events(record, "late")] == [("hospital-1", 1, 1)]
    one, two = history(record)
    assert [refusal["site"] for refusal in one["out"]] == ["hospital-1"]
    assert two["out"] == []
    assert_same(theta_of(record, study), by_hand(study, [[0, 2], [0, 1, 2]]))


class Unsent(InProcessGrid):
    """Flower gives no id for a message to a node that has left."""

    gone = 1

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        ids = list(super().push_messages(sent))
        if sent[0].metadata.message_type != "train":
            return ids
        for index in range(self.gone):
            self._pending.pop(ids[index])
        return [] if self.gone == len(ids) else [""] * self.gone + ids[self.gone :]


@pytest.mark.parametrize("gone", [1, 2])
def test_a_message_that_cannot_be_sent_is_not_waited_for(gone: int) -> None:
    study = a_study({"sites.quorum": 1})
    grid = Unsent(Scripted(study), study.run_config(), study.data.sites)
    grid.gone = gone
    record = run(study, grid, next(RUNS))
    for line in history(record):
        assert [refusal["site"] for refusal in line["out"]] == [f"hospital-{i}" for i in range(gone)]
        assert "could not send" in line["out"][0]["reason"]
        assert line["seconds"] < study.sites.deadline_seconds / 2


def test_messages_too_large_for_flower_are_named_as_such() -> None:
    study = a_study()
    grid = Unsent(Scripted(study), study.run_config(), study.data.sites)
    grid.gone = 3
    with pytest.raises(RoundError, match="hospital-2: Flower could not send"):
        run(study, grid, next(RUNS))


# Joining


def test_sites_that_are_not_prepared_are_told_what_to_type() -> None:
    study = tiny_study({"data.seed": 405})
    number = next(RUNS)
    with pytest.raises(NotPreparedError, match=r"`wardround-lab prepare STUDY\.toml`"):
        run_in_process(study, run_id=number)  # the real ClientApp
    assert "wardround-lab prepare" in (run_folder(number) / "failure.txt").read_text()
    assert not Path(run_folder(number) / "result.json").exists()


def refusing(*sites: int) -> Spoil:
    def spoil(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict | Message:
        if instruction.kind == "join" and site in sites:
            return Message(Error(NotPreparedError.code, "incident 0123abcd"), reply_to=message)
        return content

    return spoil


def test_too_few_sites_join() -> None:
    study = a_study({"sites.quorum": 3})
    with pytest.raises(RoundError) as error:
        run(study, a_grid(study, spoil=refusing(1)), next(RUNS))
    assert "2 training sites joined, sites.quorum is 3" in str(error.value)
    assert "node 1001: the site's folder for this study does not exist yet (incident 0123abcd)" in str(error.value)


def test_a_held_out_site_must_be_there() -> None:
    study = a_study()
    with pytest.raises(RoundError) as error:
        run(study, a_grid(study, spoil=refusing(3)), next(RUNS))
    assert "sites.held-out names sites that did not join: hospital-3" in str(error.value)
    assert "node 1003: the site's folder" in str(error.value)
    study = a_study({"sites.held-out": "hospital-3,hospital-9"})
    with pytest.raises(RoundError, match="hospital-9"):
        run(study, a_grid(study), next(RUNS))


def test_a_node_whose_join_failed_is_asked_again_now_and_then() -> None:
    asked: list[int] = []

    def spoil(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict | Message:
        if instruction.kind == "train" and site == 0:
            asked.append(0)
        if instruction.kind != "join" or site != 1:
            return content
        asked.append(1)
        return content if asked.count(1) > 3 else Message(Error(DataError.code), reply_to=message)

    study = a_study({"study.rounds": 16})
    record = run(study, a_grid(study, spoil=spoil), next(RUNS))
    assert asked == [1, 0, 1, *[0] * 4, 1, *[0] * 8, 1, *[0] * 3]  # before rounds 1, 2, 6 and 14
    assert len(events(record, "rejected")) == 3
    assert ["hospital-1" in line["sites"] for line in history(record)] == [False] * 13 + [True] * 3


def test_a_node_that_comes_back_is_asked_at_once() -> None:
    class Away(InProcessGrid):
        def get_nodes(self) -> Iterable[Any]:
            nodes = list(super().get_nodes())
            return [node for node in nodes if node.node_id != 1001 or rounds_begun != 3]

    rounds_begun, failed = 0, 0

    def spoil(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict | Message:
        nonlocal rounds_begun, failed
        rounds_begun = max(rounds_begun, instruction.round)
        if instruction.kind == "join" and site == 1 and failed < 2:
            failed += 1
            return Message(Error(DataError.code), reply_to=message)
        return content

    study = a_study({"study.rounds": 6})
    record = run(study, Away(Scripted(study, spoil), study.run_config(), study.data.sites), next(RUNS))
    assert ["hospital-1" in line["sites"] for line in history(record)] == [False] * 4 + [True] * 2


def test_two_nodes_of_one_site_are_refused() -> None:
    def spoil(site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict:
        if instruction.kind == "join" and site == 1:
            content.metric_records["scalars"]["site"] = 0
        return content

    study = a_study()
    with pytest.raises(RoundError, match="two nodes say that they are hospital-0"):
        run(study, a_grid(study, spoil=spoil), next(RUNS))
    with pytest.raises(RoundError, match="two nodes say that they are ward"):
        run(study, a_grid(study, names=["ward", "annex", "hospital-3", "ward"]), next(RUNS))


def test_the_server_waits_for_nodes_and_not_for_ever() -> None:
    class Slow(InProcessGrid):
        calls = 0

        def get_nodes(self) -> Iterable[Any]:
            self.calls += 1
            return super().get_nodes() if self.calls > 2 else []

    study = a_study({"study.rounds": 1})
    grid = Slow(Scripted(study), study.run_config(), study.data.sites)
    assert history(run(study, grid, next(RUNS)))[0]["out"] == []

    class Nobody(Slow):
        def get_nodes(self) -> Iterable[Any]:
            return []

    study = a_study({"sites.join-seconds": 0.2, "sites.held-out": ""})
    with pytest.raises(RoundError, match="0 training sites joined"):
        run(study, Nobody(Scripted(study), study.run_config(), study.data.sites), next(RUNS))


def test_local_only_runs_no_round() -> None:
    study = a_study({"algorithm.name": "local-only"})
    record = run(study, a_grid(study), next(RUNS))
    assert history(record) == []
    assert result(record)["rounds"] == 0
    assert_same(theta_of(record, study), flatten(initial_theta(study)).numpy())

"""The engine around the gradient: the same bits on any number of cores, nothing changed behind the caller's back."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common.errors import DeviceError
from common.meta import Batch, Engine, Episodes, make_learner
from common.models.network import Network
from tests.common.meta import oracle
from tests.common.meta.cases import (
    INNER_LOOPS,
    SmoothBody,
    Variant,
    engine,
    make_conv4,
    make_episodes,
    paths,
    relative_error,
    rows,
    setting,
)

PER_EPISODE = (*INNER_LOOPS, Variant("reptile"))


@pytest.mark.parametrize("variant", PER_EPISODE, ids=str)
def test_the_same_bits_on_one_core_and_two(variant: Variant) -> None:
    problem = setting(variant, 1, tasks=5, ragged="both", build=make_conv4)
    one, two = (engine(problem, path) for path in ("loop", "loop, 2 cores"))
    for reduce in ("mean", "none"):
        results = [run.meta_gradient(problem.theta, problem.episodes, reduce=reduce) for run in (one, two, two)]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    first, second = (run.scores(problem.theta, problem.episodes, 2) for run in (one, two))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_local_sgd_over_a_round_needs_no_particular_number_of_cores() -> None:
    """FedAvg's tasks follow one another, so its one worker has all the threads: the last bits may differ."""
    problem = setting(Variant("fedavg"), 1, build=make_conv4)
    assert relative_error(rows(problem, "loop, 2 cores").gradient, rows(problem).gradient) < 1e-12


CHANGELESS = [
    (variant, path)
    for variant in (*PER_EPISODE, Variant("fedavg"), Variant("fedprox"))
    for path in paths(variant)
    if path in {"loop", "loop, 2 cores", "loop, replayed", "vmap"}
]


@pytest.mark.parametrize(("variant", "path"), CHANGELESS, ids=str)
def test_nothing_that_was_passed_in_changes(variant: Variant, path: str) -> None:
    problem = setting(variant, 1, ragged="both")
    tensors = [
        *problem.theta.values(),
        *problem.network.parameters(),
        *(t for batch in problem.episodes[:2] for t in batch if t is not None),
        problem.episodes.classes,
    ]
    before = [t.detach().clone() for t in tensors]
    threads = torch.get_num_threads()
    rows(problem, path)
    engine(problem, path).scores(problem.theta, problem.episodes, 2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert not any(t.requires_grad for t in problem.theta.values())
    assert all(p.grad is None for p in problem.network.parameters())
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_the_callers_number_of_threads_stays() -> None:
    """Workers with one thread each must not leave a thread that had not yet asked with one."""
    problem = setting(Variant("maml"), 1)

    def run() -> int:
        rows(problem, "loop, 2 cores")
        return torch.get_num_threads()

    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(run).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_results_are_summed_by_one_thread_while_the_workers_run() -> None:
    """Or OpenMP's helpers would spin beside them."""
    problem = setting(Variant("maml"), 1)
    torch.set_num_threads(2)
    try:
        parts = engine(problem, "loop, 2 cores")._gradients(problem.theta, problem.episodes, "mean")
        assert [torch.get_num_threads() for _ in parts] == [1] * problem.episodes.n_tasks
    finally:
        torch.set_num_threads(1)


def test_results_are_detached_from_everything() -> None:
    problem = setting(Variant("maml"), 1)
    assert not any(t.requires_grad for t in rows(problem))


def test_a_caller_without_gradients_gets_them_all_the_same() -> None:
    problem = setting(Variant("maml"), 1)
    with torch.no_grad():
        quiet = rows(problem)
    assert torch.equal(quiet.gradient, rows(problem).gradient)


def test_two_engines_on_one_network_in_two_threads() -> None:
    """A site answers two messages at once; ``functional_call`` would mix their parameters in a shared module."""
    one = setting(Variant("maml"), 2, tasks=4)
    two = one._replace(theta={n: 0.5 * t for n, t in one.theta.items()})
    alone = [rows(problem).gradient for problem in (one, two)]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            together = pool.map(lambda problem: rows(problem, "loop, 2 cores").gradient, (one, two))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_only_the_structure_of_the_network_matters() -> None:
    problem = setting(Variant("maml"), 1)
    other = problem._replace(network=make_other(problem.network))
    assert torch.equal(rows(problem).gradient, rows(other).gradient)


def make_other(network: Network) -> Network:
    """Return a network of the same structure with other parameters, of another type."""
    out = Network(SmoothBody("batch"), network.head.in_features, network.head.out_features).half()
    assert not torch.equal(out.head.weight.float(), network.head.weight)
    return out


@pytest.mark.parametrize("path", ["loop", "vmap"])
def test_no_episodes_are_refused(path: str) -> None:
    problem = setting(Variant("maml"), 1)
    nothing = problem.episodes.take(slice(0, 0))
    with pytest.raises(DeviceError, match="no episodes"):
        engine(problem, path).meta_gradient(problem.theta, nothing)
    with pytest.raises(DeviceError, match="no episodes"):
        engine(problem, path).scores(problem.theta, nothing, 1)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_a_round_of_local_sgd_has_no_gradient_per_episode(name: str) -> None:
    problem = setting(Variant(name), 1)
    with pytest.raises(DeviceError, match=f"{name} has one pseudo-gradient a round"):
        engine(problem).meta_gradient(problem.theta, problem.episodes, reduce="none")


def test_local_only_has_nothing_to_share() -> None:
    problem = setting(Variant("maml"), 1)
    alone = Engine(make_learner(Variant("local-only").algorithm(1)), problem.network)
    with pytest.raises(DeviceError, match="local-only shares nothing"):
        alone.meta_gradient(problem.theta, problem.episodes)


class MasklessBody(SmoothBody):
    """A network from elsewhere that normalises over the batch and knows no masks."""

    takes_mask = False


@pytest.mark.parametrize("ragged", ["support", "query", "both"])
def test_batch_statistics_without_masks_cannot_be_batched_over_ragged_tasks(ragged: str) -> None:
    problem = setting(Variant("maml"), 2, ragged=ragged)
    problem = problem._replace(network=Network(MasklessBody("batch"), 8, 3))
    with pytest.raises(DeviceError, match=r"ragged episodes .* model\.norm = 'group'"):
        rows(problem, "vmap")
    want, _ = oracle.meta_gradients(problem.algorithm, oracle.smooth("batch"), problem.theta, problem.episodes)
    assert relative_error(rows(problem, "loop").gradient, want) < 1e-10  # one by one there is no padding


def test_images_apart_from_one_another_need_no_masks() -> None:
    problem = setting(Variant("maml"), 2, "group", ragged="both")
    problem = problem._replace(network=Network(MasklessBody("group"), 8, 3))
    want, _ = oracle.meta_gradients(problem.algorithm, oracle.smooth("group"), problem.theta, problem.episodes)
    for path in ("loop", "vmap", "vmap, replayed"):
        assert relative_error(rows(problem, path).gradient, want) < 1e-10


def test_full_masks_cost_nothing_and_change_nothing() -> None:
    problem = setting(Variant("maml"), 2)

    def masked(batch: Batch) -> Batch:
        return batch._replace(mask=torch.ones_like(batch.y, dtype=torch.bool))

    support, query, classes = problem.episodes
    full = problem._replace(episodes=Episodes(masked(support), masked(query), classes))
    for path in ("loop", "vmap"):
        assert torch.equal(rows(full, path).gradient, rows(problem, path).gradient)


def test_what_padding_rows_hold_does_not_matter() -> None:
    problem = setting(Variant("protomaml"), 2, ragged="both")

    def scrambled(batch: Batch) -> Batch:
        assert batch.mask is not None
        padding = ~batch.mask
        x, y = batch.x.clone(), batch.y.clone()
        x[padding], y[padding] = -3 * x[padding] + 7, 2
        return Batch(x, y, batch.mask)

    support, query, classes = problem.episodes
    other = problem._replace(episodes=Episodes(scrambled(support), scrambled(query), classes))
    assert torch.equal(rows(other, "loop").gradient, rows(problem, "loop").gradient)
    for path in ("vmap", "vmap, replayed"):
        assert relative_error(rows(other, path).gradient, rows(problem, path).gradient) < 1e-12


def test_one_task_drops_its_padding_and_keeps_its_order() -> None:
    episodes = make_episodes(3, ragged="both")
    for index, want in enumerate(oracle.tasks(episodes)):
        for channels_last in (False, True):
            task = episodes.task(index, channels_last=channels_last)
            assert torch.equal(task.support.x, want.support_x)
            assert torch.equal(task.support.y, want.support_y)
            assert torch.equal(task.query.x, want.query_x)
            assert torch.equal(task.query.y, want.query_y)
            assert task.support.mask is task.query.mask is None
            strides = task.support.x.stride()
            assert (strides[1] == 1) == channels_last or task.support.x.shape[1] == 1
            assert (strides[3] == strides[1] * task.support.x.shape[1]) or not channels_last

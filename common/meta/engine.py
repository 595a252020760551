"""Many episodes to one meta-gradient: exact, as fast as the device allows, one interface.

On a CPU every task is differentiated by eager autograd, in as many single-threaded workers as there are cores;
results are added in task order, so no bit depends on how many workers ran. On a GPU a chunk of tasks is one
``vmap(grad)``, as large as the memory allows; several GPUs share the chunks.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from common import figures
from common.errors import DeviceError
from common.meta import patients
from common.meta.autodiff import EAGER, FUNCTIONAL, Autodiff
from common.meta.episodes import Batch, Episodes, accuracy, cross_entropy
from common.meta.fedavg import FedAvg
from common.meta.learner import EpisodeGradient, InnerLoop, Learner
from common.meta.reptile import Reptile
from common.models.network import Network, Theta

__all__ = ["Engine", "MetaGradient", "Scores", "flatten", "unflatten"]

Result = TypeVar("Result", bound=tuple[object, ...])
# What is done with one task, and with a chunk of tasks; the latter's results have a leading task axis.
TaskWork = Callable[[Network, Theta, Episodes, Autodiff], Result]
ChunkWork = Callable[[Network, Theta, Episodes], Result]


class MetaGradient(NamedTuple):
    """What a set of episodes says about theta.

    Attributes
    ----------
    gradient : Tensor
        ``[D]``, the mean over tasks, or ``[T, D]``, one row a task; theta's tensors in their order, flattened.
    loss, accuracy : Tensor
        Query loss (nats) and query accuracy (0 to 1): the mean over tasks ``[]``, or one a task ``[T]``.
    """

    gradient: Tensor
    loss: Tensor
    accuracy: Tensor


class Scores(NamedTuple):
    """How good the predictions on every task's query set are, ``[T]`` each.

    Attributes
    ----------
    accuracy, loss : Tensor
        Share of images whose top class is right, and cross-entropy in nats.
    balanced, auroc, ece : Tensor
        Balanced accuracy, AUROC and expected calibration error (10 bins), as `common.figures` defines them; not a
        number where the classes of the query images leave one without a meaning.
    """

    accuracy: Tensor
    loss: Tensor
    balanced: Tensor
    auroc: Tensor
    ece: Tensor


def flatten(theta: Theta) -> Tensor:
    """Return theta's tensors as one vector ``[D]``, in their order."""
    return torch.cat([t.reshape(-1) for t in theta.values()])


def unflatten(vector: Tensor, like: Theta) -> dict[str, Tensor]:
    """Return the inverse of `flatten`: views of a vector ``[D]`` with the names and shapes of ``like``."""
    sizes = [t.numel() for t in like.values()]
    return {n: v.view(t.shape) for (n, t), v in zip(like.items(), torch.split(vector, sizes), strict=True)}


@dataclass(frozen=True)
class Engine:
    """Runs a learner over episodes on the devices of one machine.

    Parameters
    ----------
    learner : Learner
        The algorithm.
    network : Network
        Only its structure is used, never its parameters.
    devices : tuple of torch.device
        Tasks are split over them; several only for CUDA.
    cores : int
        CPU cores to use.
    precision : {"full", "bf16"}
        ``bf16`` runs convolutions and products under autocast: faster on a GPU, and not exact.
    vectorise : bool or None
        Whether to use ``vmap``. None: on CUDA only; on a CPU it is slower than the loop.
    chunk : int or None
        Tasks in one ``vmap``. None: all of them on a CPU, what a first task shows to fit on a GPU.
    """

    learner: Learner
    network: Network
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)
    cores: int = 1
    precision: Literal["full", "bf16"] = "full"
    vectorise: bool | None = None
    chunk: int | None = None
    _fits: dict[tuple[object, ...], int] = field(default_factory=dict, repr=False, compare=False)
    _idle: list[Network] = field(default_factory=list, init=False, repr=False, compare=False)  # copies not in use

    def meta_gradient(
        self, theta: Theta, episodes: Episodes, *, reduce: Literal["mean", "none"] = "mean"
    ) -> MetaGradient:
        """Return the meta-gradient of some episodes at theta, on the CPU.

        Parameters
        ----------
        theta : Theta
            As `Learner.theta` returns it; its floating-point type is the type of the computation.
        episodes : Episodes
            T tasks.
        reduce : {"mean", "none"}
            The mean over tasks (memory does not grow with T), or a row for every task.

        Raises
        ------
        DeviceError
            A task does not fit into the device's memory; or the learner has no such gradient.
        """
        rows: list[Tensor] = []
        losses, hits = [], []
        for part in self._gradients(theta, episodes, reduce):
            losses.append(part.loss)
            hits.append(part.accuracy)
            for row in _rows(part.gradient):
                if rows and reduce == "mean":  # one by one, in task order: the same sum whatever the workers
                    rows[0] += row
                else:
                    rows.append(row.clone())
        loss, hit = torch.cat(losses), torch.cat(hits)
        if reduce == "none":
            return MetaGradient(torch.stack(rows), loss, hit)
        return MetaGradient(rows[0] / len(loss), loss.mean(), hit.mean())

    def patient_gradients(self, at: Theta, people: Episodes) -> Iterator[MetaGradient]:
        """Yield every patient's own gradient ``[D]``, loss and accuracy at some parameters, on the CPU.

        Parameters
        ----------
        at : Theta
            Any parameters of the network; their floating-point type is the type of the computation.
        people : Episodes
            P patients as tasks: the support set of each is the patient's images, and the query set is not looked at.
        """

        def work(network: Network, at: Theta, patient: Episodes, autodiff: Autodiff) -> EpisodeGradient:
            return patients.gradient(network, at, patient.support, autodiff)

        for part in self._tasks(at, people, work, "patients.gradient"):
            yield from map(MetaGradient, _rows(part.gradient), part.loss, part.accuracy)

    def patient_products(self, at: Theta, along: Theta, people: Episodes) -> Iterator[Tensor]:
        """Yield the Hessian of every patient's own loss at some parameters times a vector: ``[D]``, on the CPU.

        Parameters
        ----------
        at, people
            As in `patient_gradients`.
        along : Theta
            The vector, with the names and shapes of ``at``.
        """

        def work(network: Network, at: Theta, patient: Episodes, autodiff: Autodiff) -> tuple[dict[str, Tensor]]:
            here = {name: t.to(patient.support.x.device) for name, t in along.items()}
            return (patients.product(network, at, here, patient.support, autodiff),)

        for (part,) in self._tasks(at, people, work, "patients.product"):
            yield from _rows(part)

    def scores(self, theta: Theta, episodes: Episodes, steps: int) -> Scores:
        """Return every task's query scores after ``steps`` steps on its support set, on the CPU."""

        def work(network: Network, theta: Theta, task: Episodes, autodiff: Autodiff) -> Scores:
            with torch.no_grad():
                state = self.learner.adapt(network, theta, task.support, task.classes, steps, autodiff)
                logits = self.learner.predict(network, state, task.query)
            # In float64, or confident images of different logits would tie; what has diverged knows nothing.
            probabilities = logits.cpu().double().nan_to_num().softmax(-1).numpy()
            labels = task.query.y.cpu().numpy()
            rest = (figures.balanced_accuracy, figures.auroc, figures.expected_calibration_error)
            return Scores(
                accuracy(logits, task.query),
                cross_entropy(logits, task.query),
                *(torch.as_tensor(figure(probabilities, labels)) for figure in rest),
            )

        parts = list(self._map(theta, episodes, self._eager(work), 1))
        return Scores(*map(torch.cat, zip(*parts, strict=True)))

    def _gradients(self, theta: Theta, episodes: Episodes, reduce: str) -> Iterator[EpisodeGradient]:
        learner = self.learner
        if isinstance(learner, FedAvg):
            if reduce == "none":
                raise DeviceError(f"{learner.name} has one pseudo-gradient a round, none per episode")
            return self._map(theta, episodes, self._sequence(learner), episodes.n_tasks)
        if not isinstance(learner, InnerLoop | Reptile):
            raise DeviceError(f"{learner.name} shares nothing between sites: it has no meta-gradient")
        return self._tasks(theta, episodes, learner.episode_gradient, "episode_gradient")

    def _tasks(self, theta: Theta, episodes: Episodes, work: TaskWork[Result], name: str) -> Iterator[Result]:
        """Yield some work's results of all tasks, by the way that suits the device; the name is for its memory."""
        if self.devices[0].type == "cuda" if self.vectorise is None else self.vectorise:
            together = _vectorised(work)
            return self._map(theta, episodes, together, self._chunk(theta, episodes, together, name))
        return self._map(theta, episodes, self._eager(work), 1)

    def _eager(self, work: TaskWork[Result]) -> ChunkWork[Result]:
        def run(network: Network, theta: Theta, chunk: Episodes) -> Result:
            tasks = (chunk.task(i, channels_last=self._channels_last()) for i in range(chunk.n_tasks))
            return _stack([work(network, theta, task, EAGER) for task in tasks])

        return run

    def _sequence(self, learner: FedAvg) -> ChunkWork[EpisodeGradient]:
        def run(network: Network, theta: Theta, chunk: Episodes) -> EpisodeGradient:
            tasks = (chunk.task(i, channels_last=self._channels_last()) for i in range(chunk.n_tasks))
            return _stack([learner.round_gradient(network, theta, tasks, EAGER)])

        return run

    def _channels_last(self) -> bool:
        return self.devices[0].type == "cpu" and bool(self.network.body.channels_last)

    def _map(self, theta: Theta, episodes: Episodes, work: ChunkWork[Result], size: int) -> Iterator[Result]:
        """Yield ``work`` of every chunk of ``size`` tasks, in task order, run by this machine's workers."""
        if episodes.n_tasks == 0:
            raise DeviceError("no episodes were given: there is nothing to compute")
        starts = range(0, episodes.n_tasks, size)
        on_cpu = self.devices[0].type == "cpu"
        workers = min(self.cores if on_cpu else len(self.devices), len(starts))
        dtype = next(iter(theta.values())).dtype
        # `functional_call` swaps parameters inside a module: a thread needs one of its own while it works.
        slots: SimpleQueue[tuple[Network, torch.device, Theta]] = SimpleQueue()
        for i in range(workers):
            device = self.devices[i % len(self.devices)]
            slots.put((self._structure(), device, {n: t.to(device) for n, t in theta.items()}))

        def run(start: int) -> Result:
            slot = slots.get()
            try:
                network, device, here = slot
                chunk = episodes.take(slice(start, start + size)).to(device, dtype)
                with torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext():
                    out = work(network, here, chunk)
                moved: Result = tree_map(lambda t: t.to("cpu", dtype), out)
                return moved
            except torch.OutOfMemoryError:
                raise DeviceError(
                    f"{size} task(s) at once do not fit into the memory of {device}: use algorithm.recompute, "
                    "a smaller network or fewer images per episode"
                ) from None
            finally:
                slots.put(slot)

        with (
            # TF32 has 10 bits of mantissa and is on by default for convolutions: not exact.
            torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False),
            _single_threaded(),
            ThreadPoolExecutor(workers) as pool,
        ):
            yield from pool.map(run, starts)
        self._idle.extend(slots.get()[0] for _ in range(workers))

    def _structure(self) -> Network:
        """Return a copy of the network without numbers: making one takes as long as a tenth of an episode."""
        try:
            return self._idle.pop()
        except IndexError:
            return deepcopy(self.network).to("meta")

    def _chunk(self, theta: Theta, episodes: Episodes, work: ChunkWork[Result], name: str) -> int:
        """Return how many tasks one ``vmap`` takes: as asked, or as one task's measured peak lets fit."""
        device = self.devices[0]
        share = -(-episodes.n_tasks // len(self.devices))
        if self.chunk is not None or device.type != "cuda":
            return self.chunk or share
        key = (name, *episodes.support.x.shape[1:], *episodes.query.x.shape[1:])
        if key not in self._fits:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            list(self._map(theta, episodes.take(slice(0, 1)), work, 1))
            peak = torch.cuda.max_memory_allocated(device) - before
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
            self._fits[key] = max(1, int(0.8 * free / max(peak, 1)))
        return min(share, self._fits[key])


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Keep this thread, and those that it starts, to one thread an operation.

    Also where the results are summed: OpenMP's helper threads go on spinning after every operation that was split over
    them, and take a quarter of the workers' time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _vectorised(work: TaskWork[Result]) -> ChunkWork[Result]:
    def run(network: Network, theta: Theta, chunk: Episodes) -> Result:
        support, query = _unmasked(chunk.support), _unmasked(chunk.query)
        ragged = support.mask is not None or query.mask is not None
        if ragged and network.body.mixes_rows and not network.body.takes_mask:
            raise DeviceError(
                "ragged episodes on a network with batch statistics and no masks: use model.norm = 'group'"
            )

        def one(task: Episodes) -> Result:
            return work(network, theta, task, FUNCTIONAL)

        task = Episodes(support, query, chunk.classes)
        axes = tree_map(lambda leaf: None if leaf is None else 0, task)
        out: Result = torch.vmap(one, in_dims=(axes,))(task)
        return out

    return run


def _rows(parts: Theta) -> Tensor:
    """Return tensors with a leading task axis as one row ``[D]`` a task."""
    return torch.cat([t.reshape(len(t), -1) for t in parts.values()], 1)


def _unmasked(batch: Batch) -> Batch:
    """Return a batch without mask where no row is padding: masks cost a slower norm."""
    return batch._replace(mask=None) if batch.mask is not None and bool(batch.mask.all()) else batch


def _stack(parts: list[Result]) -> Result:
    stacked: Result = tree_map(lambda *leaves: torch.stack(leaves).detach(), *parts)
    return stacked

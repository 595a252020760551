"""What a learner is, and the inner loop that the gradient-based ones share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from common.meta.autodiff import Autodiff
from common.meta.episodes import Batch, Episodes, accuracy, cross_entropy
from common.models.network import Network, Theta

__all__ = ["EpisodeGradient", "InnerLoop", "Learner", "State"]


class EpisodeGradient(NamedTuple):
    """One task's meta-gradient (theta's names and shapes), query loss and query accuracy (scalars)."""

    gradient: dict[str, Tensor]
    loss: Tensor
    accuracy: Tensor


class State(NamedTuple):
    """The inner loop's variables.

    Attributes
    ----------
    fast : Theta
        What the inner loop changes.
    fixed : Theta
        What it only reads: parameters that do not adapt, learned rates, features computed once. Both are
        differentiable functions of theta.
    """

    fast: Theta
    fixed: Theta


class Learner(ABC):
    """One algorithm: what theta is, what a task's gradient is, how to adapt at meta-test time."""

    name: ClassVar[str]
    #: Whether every episode has a gradient of its own, or only the whole round has one (local SGD).
    per_episode: ClassVar[bool] = True

    def theta(self, network: Network) -> dict[str, Tensor]:
        """Return the initial theta: the tensors that this learner shares, by name."""
        return network.theta()

    @abstractmethod
    def adapt(
        self, network: Network, theta: Theta, support: Batch, classes: Tensor, steps: int, autodiff: Autodiff
    ) -> State:
        """Return the state after ``steps`` inner steps at meta-test time (0: not adapted at all)."""

    @abstractmethod
    def predict(self, network: Network, state: State, batch: Batch) -> Tensor:
        """Return the logits ``[N, ways]`` of a batch under an adapted state."""


@dataclass(frozen=True)
class InnerLoop(Learner):
    """Learners that differentiate the query loss through an inner loop of gradient steps.

    With fast weights ``f_0`` from `begin` and ``f_{k+1} = f_k - rate * dL_support(f_k)/df_k``, a task's
    meta-gradient is ``d L_query(f_K) / d theta``, all terms included unless ``second_order`` is false.

    Parameters
    ----------
    inner_steps : int
        K in training.
    inner_rate, test_rate : float
        Rates of the inner loop in training and at meta-test time.
    recompute : bool
        Keep only the iterates ``f_k`` and replay one step at a time on the way back: memory does not grow with
        K, for about a third more work in the inner loop.

    References
    ----------
    Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", 2017, equation 1 and algorithm 1.
    """

    inner_steps: int
    inner_rate: float
    test_rate: float
    recompute: bool = False

    second_order: ClassVar[bool] = True

    def begin(self, network: Network, theta: Theta, support: Batch) -> State:
        """Return the state before the first step, as a differentiable function of theta."""
        return State(theta, {})

    def rate(self, fixed: Theta, name: str, base: float) -> Tensor | float:
        """Return the rate of one fast tensor; ``base`` is the study's fixed rate."""
        return base

    def predict(self, network: Network, state: State, batch: Batch) -> Tensor:
        return network.logits({**state.fixed, **state.fast}, batch.x, batch.mask)

    def support_loss(self, network: Network, state: State, support: Batch) -> Tensor:
        """Return the loss that the inner loop descends."""
        return cross_entropy(self.predict(network, state, support), support)

    def step(
        self, network: Network, state: State, support: Batch, base: float, autodiff: Autodiff, *, second: bool
    ) -> dict[str, Tensor]:
        """Return the fast weights after one inner step."""
        grads = autodiff.inner(
            lambda fast: self.support_loss(network, State(fast, state.fixed), support),
            state.fast,
            second_order=second,
        )
        return {n: f - self.rate(state.fixed, n, base) * grads[n] for n, f in state.fast.items()}

    def adapt(
        self, network: Network, theta: Theta, support: Batch, classes: Tensor, steps: int, autodiff: Autodiff
    ) -> State:
        state = self.begin(network, theta, support)
        for _ in range(steps):
            fast = self.step(network, state, support, self.test_rate, autodiff, second=False)
            state = State(fast, state.fixed)
        return state

    def episode_gradient(self, network: Network, theta: Theta, task: Episodes, autodiff: Autodiff) -> EpisodeGradient:
        """Return the meta-gradient of one task (no task axis; masks honoured)."""

        def query(state: State) -> tuple[Tensor, Tensor]:
            logits = self.predict(network, state, task.query)
            return cross_entropy(logits, task.query), accuracy(logits.detach(), task.query)

        def unrolled(theta: Theta) -> tuple[Tensor, Tensor]:
            state = self.begin(network, theta, task.support)
            for _ in range(self.inner_steps):
                fast = self.step(network, state, task.support, self.inner_rate, autodiff, second=self.second_order)
                state = State(fast, state.fixed)
            return query(state)

        if not self.recompute or self.inner_steps == 0 or not self.second_order:
            return EpisodeGradient(*autodiff.outer(unrolled, theta))
        return self._replayed(network, theta, task, autodiff, query)

    def _replayed(
        self,
        network: Network,
        theta: Theta,
        task: Episodes,
        autodiff: Autodiff,
        query: Callable[[State], tuple[Tensor, Tensor]],
    ) -> EpisodeGradient:
        """Return the same gradient by reverse replay: v <- v (d f_{k+1} / d f_k), one step's graph at a time."""
        start = self.begin(network, theta, task.support)
        fixed = {name: t.detach() for name, t in start.fixed.items()}
        iterates = [{name: t.detach() for name, t in start.fast.items()}]
        for _ in range(self.inner_steps):
            state = State(iterates[-1], fixed)
            fast = self.step(network, state, task.support, self.inner_rate, autodiff, second=False)
            iterates.append({name: t.detach() for name, t in fast.items()})

        joint = _join(State(iterates.pop(), fixed))
        grads, loss, hits = autodiff.outer(lambda both: query(_part(both)), joint)
        on_fast, on_fixed = _part(grads)
        for fast in reversed(iterates):

            def one_step(fast: Theta, fixed: Theta) -> Theta:
                state = State(fast, fixed)
                return self.step(network, state, task.support, self.inner_rate, autodiff, second=True)

            on_fast, more = autodiff.pull(one_step, fast, fixed, on_fast)
            on_fixed = {name: t + more[name] for name, t in on_fixed.items()}

        def begin(theta: Theta, _: Theta) -> Theta:
            return _join(self.begin(network, theta, task.support))

        gradient, _ = autodiff.pull(begin, theta, {}, _join(State(on_fast, on_fixed)))
        return EpisodeGradient(gradient, loss, hits)


def _join(state: State) -> dict[str, Tensor]:
    return {f"fast/{n}": t for n, t in state.fast.items()} | {f"fixed/{n}": t for n, t in state.fixed.items()}


def _part(both: Theta) -> State:
    return State(
        {n.removeprefix("fast/"): t for n, t in both.items() if n.startswith("fast/")},
        {n.removeprefix("fixed/"): t for n, t in both.items() if n.startswith("fixed/")},
    )

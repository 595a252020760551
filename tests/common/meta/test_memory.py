"""Replay keeps the inner loop's memory flat; measured as the bytes that autograd holds for a backward pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from common.meta import make_learner
from common.meta.autodiff import EAGER
from common.meta.learner import InnerLoop
from tests.common.meta.cases import Setting, Variant, make_conv4, setting


class _Saved:
    """The bytes that autograd holds, and the most it ever held."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def pack(self, tensor: Tensor) -> "_Held":
        return _Held(tensor, self)


class _Held:
    def __init__(self, tensor: Tensor, saved: _Saved) -> None:
        # Detached: a saved output would otherwise hold its own node, and the node it.
        self.tensor, self.saved = tensor.detach(), saved
        saved.alive += tensor.nbytes
        saved.peak = max(saved.peak, saved.alive)

    def __del__(self) -> None:
        self.saved.alive -= self.tensor.nbytes


def _unpack(held: _Held) -> Tensor:
    return held.tensor


def _peak(problem: Setting, *, recompute: bool) -> int:
    learner = make_learner(problem.algorithm.model_copy(update={"recompute": recompute}))
    assert isinstance(learner, InnerLoop)
    saved = _Saved()
    # Not through the engine: the hooks belong to this thread, and its workers are others.
    with saved_tensors_hooks(saved.pack, _unpack):
        learner.episode_gradient(problem.network, problem.theta, problem.episodes.task(0), EAGER)
    assert saved.alive == 0
    return saved.peak


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("variant", [Variant("maml"), Variant("metasgd"), Variant("protomaml")], ids=str)
def test_memory_is_flat_in_the_inner_steps_with_replay_and_grows_without(variant: Variant, norm: str) -> None:
    two, ten = (setting(variant, steps, norm, build=make_conv4) for steps in (2, 10))
    assert _peak(ten, recompute=True) < 1.15 * _peak(two, recompute=True)
    assert _peak(ten, recompute=False) > 3 * _peak(two, recompute=False)
    assert _peak(ten, recompute=True) < 0.3 * _peak(ten, recompute=False)


def test_first_order_needs_no_more_memory_for_more_steps() -> None:
    two, ten = (setting(Variant("fomaml"), steps, build=make_conv4) for steps in (2, 10))
    assert _peak(ten, recompute=False) < 1.15 * _peak(two, recompute=False)


def test_the_count_sees_what_autograd_holds() -> None:
    saved = _Saved()
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    functions: list[Callable[[Tensor], Tensor]] = [torch.exp, torch.sin]
    with saved_tensors_hooks(saved.pack, _unpack):
        y = x
        for function in functions:
            y = function(y)
        assert saved.alive == saved.peak == 2 * 8000
        torch.autograd.grad(y.sum(), x)
    del y
    assert saved.alive == 0
    assert saved.peak == 2 * 8000

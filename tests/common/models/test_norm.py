"""Batch norm against finite differences and against PyTorch's, to second order, on every engine path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from common.models.norm import BatchStatNorm, batch_norm, make_norm, masked_batch_norm
from tests.common.models.maml import PATHS, Logits, Theta, by_loop

SHAPES = ([4, 3], [2, 3, 2, 1], [2, 3, 1, 2, 1])
GAMMA, BETA = [1.3, 0.0, -0.7], [0.2, -0.4, 0.0]  # a zero and a negative scale


def _inputs(shape: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gamma, beta = torch.tensor(GAMMA, dtype=torch.float64), torch.tensor(BETA, dtype=torch.float64)
    return x.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_()


def _plain(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, gamma, beta, training=True)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_derivatives_are_those_of_finite_differences(shape: list[int]) -> None:
    inputs = _inputs(shape)
    assert torch.autograd.gradcheck(batch_norm, inputs)
    assert torch.autograd.gradgradcheck(batch_norm, inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_values_and_derivatives_are_those_of_pytorch(shape: list[int]) -> None:
    def derivatives(norm: Callable[..., Tensor]) -> list[Tensor]:
        inputs = _inputs(shape)
        out = norm(*inputs)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(torch.cat([g.flatten() for g in first]).pow(3).sum(), inputs)
        return [out, *first, *second]

    for ours, theirs in zip(derivatives(batch_norm), derivatives(_plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_masked_norm_is_the_norm_of_the_real_rows() -> None:
    x, gamma, beta = _inputs([6, 3, 2, 2])
    mask = torch.tensor([True, False, True, True, False, True])
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    masked, sliced = masked_batch_norm(x, gamma, beta, mask)[mask], batch_norm(x[mask], gamma, beta)
    torch.testing.assert_close(masked, sliced, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((sliced * weight).sum(), (x, gamma, beta))
    for got, want in zip(torch.autograd.grad((masked * weight).sum(), (x, gamma, beta)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_masked_norm_does_not_see_the_padding() -> None:
    x, gamma, beta = (t.detach() for t in _inputs([4, 3, 2, 2]))
    mask = torch.tensor([True, True, True, False])
    other = torch.where(mask.view(-1, 1, 1, 1), x, 1e3)
    ours, theirs = (masked_batch_norm(images, gamma, beta, mask)[mask] for images in (x, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class _Small(nn.Module):
    """Two norms, with something before each, so that their input depends on the parameters."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, 3, 3, padding=1, bias=False) for a in (2, 3))
        self.norms = nn.ModuleList(norm() for _ in range(2))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.tanh(norm(layer(x), *mask))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _plain_norm() -> nn.Module:
    return nn.BatchNorm2d(3, track_running_stats=False)


def _logits(norm: Callable[[], nn.Module]) -> Logits:
    net = _Small(norm)

    def logits(theta: Theta, x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = functional_call(net, dict(theta), (x,) if mask is None else (x, mask))
        return out

    return logits


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("path", PATHS)
def test_maml_gradient_is_that_of_a_loop_over_pytorchs_norm(path: Callable[..., Theta], padded: bool) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    theta = {name: draw(*p.shape) for name, p in _Small(_plain_norm).named_parameters()}
    theta["norms.0.weight"] = torch.tensor(GAMMA, dtype=torch.float64)
    tasks = [draw(3, 2, 6, 2, 4, 4), torch.randint(3, (3, 2, 6), generator=generator)]
    if padded:
        tasks.append(torch.arange(6) < torch.arange(4, 7)[:, None])  # task t has t + 4 real rows
    got = path(_logits(lambda: BatchStatNorm(3)), theta, *tasks)
    torch.testing.assert_close(got, by_loop(_logits(_plain_norm), theta, *tasks), rtol=1e-12, atol=1e-12)


def test_norms_keep_no_buffers_and_have_no_modes() -> None:
    x = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(4))
    for kind in ("batch", "group"):
        norm = make_norm(kind, 6)
        assert dict(norm.named_buffers()) == {}
        torch.testing.assert_close(norm.train()(x), norm.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (7, 7), (12, 6), (22, 2), (32, 8)])
def test_group_norm_has_as_many_groups_as_divide_the_channels(channels: int, groups: int) -> None:
    norm = make_norm("group", channels)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups

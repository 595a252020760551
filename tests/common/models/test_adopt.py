"""Classifiers written for ordinary training, as `adopt` takes them in."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.models import Network
from common.models.adopt import adopt
from common.models.norm import BatchStatNorm
from tests.common.models.maml import PATHS, Theta, by_loop

CLASSES, IMAGE = 3, (2, 6, 6)


def _classifier(norm: nn.Module, *after: nn.Module) -> nn.Module:
    """Make a small classifier in float64, with a scale below zero and an activation in place."""
    layers = [nn.Conv2d(2, 4, 3), norm, nn.ELU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(4, CLASSES), *after).to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return net


def _images(*shape: int) -> Tensor:
    return torch.randn(*shape, *IMAGE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def _adopt(net: nn.Module, norm: str = "batch") -> Network:
    return adopt(net, norm=norm, classes=CLASSES, image=IMAGE).to(torch.float64)


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "instance": lambda: nn.InstanceNorm2d(4),
    "instance affine": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layer": lambda: nn.LayerNorm([4, 4, 4]),
    "layer without bias": lambda: nn.LayerNorm([4, 4], bias=False),
    "group": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_function_is_that_of_the_classifier_in_training(norm: Callable[[], nn.Module]) -> None:
    classifier = _classifier(norm())
    net = _adopt(deepcopy(classifier))
    old = classifier.state_dict()
    theta = net.theta() | {"head.weight": old["5.weight"], "head.bias": old["5.bias"]}
    x = _images(5)
    torch.testing.assert_close(net.logits(theta, x), classifier(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_maml_gradient_is_exact(norm: Callable[[], nn.Module], path: Callable[..., Theta]) -> None:
    net = _adopt(_classifier(norm()))
    x, y = _images(3, 2, 4), torch.randint(CLASSES, (3, 2, 4), generator=torch.Generator().manual_seed(3))
    wanted = by_loop(net.logits, net.theta(), x, y)
    torch.testing.assert_close(path(net.logits, net.theta(), x, y), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("norm", "mixes"), [("batch", True), ("group", False)])
def test_batch_norm_becomes_the_norm_of_the_study(norm: str, mixes: bool) -> None:
    net = _adopt(_classifier(nn.BatchNorm2d(4)), norm)
    kind = BatchStatNorm if mixes else nn.GroupNorm
    assert isinstance(net.body.get_submodule("net.1"), kind)
    assert bool(net.body.mixes_rows) == mixes
    assert not net.body.takes_mask
    assert dict(net.named_buffers()) == {}


def test_network_without_batch_norm_does_not_mix_rows() -> None:
    assert not _adopt(_classifier(nn.LayerNorm([4, 4, 4]))).body.mixes_rows


def test_nothing_is_random_in_any_mode() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x) if self.training else x

    net = _adopt(_classifier(nn.Sequential(nn.BatchNorm2d(4), Noisy(), nn.Dropout2d(0.5))))
    x = _images(5)
    torch.testing.assert_close(net.train()(x), net.train()(x), rtol=0, atol=0)


def test_images_are_left_as_they_were() -> None:
    net, x = _adopt(nn.Sequential(nn.ELU(inplace=True), _classifier(nn.BatchNorm2d(4)))), _images(5)
    before = x.clone()
    net(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_first_of_several_outputs_is_the_logits() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _classifier(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), x

    assert _adopt(Pair())(_images(5)).shape == (5, CLASSES)


def test_last_of_two_linear_layers_of_the_right_size_is_the_head() -> None:
    net = _classifier(nn.BatchNorm2d(4), nn.Tanh(), nn.Linear(CLASSES, CLASSES))
    assert "body.net.5.weight" in _adopt(net).theta()


def _with_buffer() -> nn.Module:
    net = _classifier(nn.BatchNorm2d(4))
    net.register_buffer("position_index", torch.arange(4), persistent=False)
    return net


def _frozen() -> nn.Module:
    net = _classifier(nn.BatchNorm2d(4))
    net.get_parameter("1.weight").requires_grad_(False)
    return net


REFUSED = {
    r"keeps buffers \(position_index\)": _with_buffer,
    r"freezes parameters \(1.weight\)": _frozen,
    r"does not run on images of 2 x 6 x 6": lambda: _classifier(nn.Conv2d(4, 4, 9)),
    r"does not end in a linear layer with 3 outputs": lambda: _classifier(nn.Identity(), nn.Tanh()),
    r"with 3 outputs, so its head": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 4)),
}


@pytest.mark.parametrize(("message", "make"), REFUSED.items(), ids=REFUSED)
def test_refusals(message: str, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ModelError, match=message):
        _adopt(make())

"""A network with fixed statistics says of its own images what the network said, and of any other the same always."""

import pytest
import torch

from common.models import build
from common.models.fixed_norm import fix_statistics, with_fixed_statistics
from common.study import Model

MODELS = {
    "conv4": Model(name="conv4", width=6, channels=3, image_size=16),
    "resnet12": Model(name="resnet12", width=4, channels=3, image_size=16),
    "monai": Model(
        name="monai:DenseNet",
        channels=3,
        image_size=32,
        arguments='{"init_features": 8, "growth_rate": 4, "block_config": [2, 2]}',
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_given_images_have_the_same_logits(name: str) -> None:
    model = MODELS[name]
    network = build(model, classes=3, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    theta = {n: t + 0.1 * torch.randn(t.shape, dtype=t.dtype, generator=generator) for n, t in network.theta().items()}
    theta |= {n: -t for n, t in theta.items() if n.endswith("norms.1.weight")}  # a scale may be negative
    x = torch.randn(7, 3, model.image_size, model.image_size, dtype=torch.float64, generator=generator)
    fixed, structure = fix_statistics(network, theta, x), with_fixed_statistics(network)
    torch.testing.assert_close(structure.logits(fixed, x), network.logits(theta, x))
    one_by_one = torch.cat([structure.logits(fixed, row[None]) for row in x])
    torch.testing.assert_close(one_by_one, network.logits(theta, x))
    assert {n: t.shape for n, t in fixed.items()} == {n: t.shape for n, t in theta.items()}
    assert not structure.body.mixes_rows
    assert network.body.mixes_rows


def test_a_network_without_batch_statistics_stays_as_it_is() -> None:
    network = build(Model(width=8, norm="group", image_size=16), classes=2, seed=1)
    theta = network.theta()
    assert fix_statistics(network, theta, torch.zeros(2, 1, 16, 16)) is theta
    assert with_fixed_statistics(network) is network

"""One patient's gradient and Hessian-vector product, against autograd on the whole and finite differences."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.meta import Batch, Engine, Episodes, flatten, unflatten
from common.meta.maml import Maml
from common.models import build
from common.models.network import Network, Theta
from common.study import Model

IMAGES = (1, 3, 2)


def engine(*, vectorise: bool, name: str = "conv4") -> Engine:
    model = Model(name=name, norm="group", width=4, channels=1, image_size=16)
    network = build(model, classes=3, seed=1, dtype=torch.float64)
    return Engine(Maml(1, 0.1, 0.1), network, vectorise=vectorise)


def people(images: tuple[int, ...] = IMAGES) -> Episodes:
    """Return patients with so many images each, padded."""
    generator = torch.Generator().manual_seed(0)
    most = max(images)
    x = torch.randn(len(images), most, 1, 16, 16, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (len(images), most), generator=generator)
    mask = torch.arange(most) < torch.tensor(images)[:, None]
    x[~mask], y[~mask] = 7.0, 0  # padding that would show
    return Episodes(Batch(x, y, mask), Batch(x[:, :0], y[:, :0], None), torch.arange(3).repeat(len(images), 1))


def loss(network: Network, theta: Theta, number: int) -> Tensor:
    x, y, mask = people().support
    assert mask is not None
    return F.cross_entropy(network.logits(theta, x[number][mask[number]]), y[number][mask[number]])


@pytest.mark.parametrize("name", ["conv4", "resnet12"])
@pytest.mark.parametrize("vectorise", [False, True])
def test_every_patients_own_gradient_and_product(vectorise: bool, name: str) -> None:
    runs = engine(vectorise=vectorise, name=name)
    network = runs.network
    theta = network.theta()
    generator = torch.Generator().manual_seed(3)
    vector = torch.randn(flatten(theta).shape, generator=generator, dtype=torch.float64)
    gradients = list(runs.patient_gradients(theta, people()))
    products = list(runs.patient_products(theta, unflatten(vector, theta), people()))
    assert len(gradients) == len(products) == len(IMAGES)
    for number, (got, product) in enumerate(zip(gradients, products, strict=True)):
        leaves = {n: t.clone().requires_grad_() for n, t in theta.items()}
        value = loss(network, leaves, number)
        own = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in own])
        curved = torch.autograd.grad(flat @ vector, list(leaves.values()))
        assert torch.allclose(got.gradient, flat.detach(), atol=1e-12)
        assert torch.allclose(product, torch.cat([c.reshape(-1) for c in curved]), atol=1e-11)
        assert float(got.loss) == pytest.approx(float(value.detach()), abs=1e-12)
        assert 0 <= got.accuracy <= 1


def test_a_product_is_how_the_gradient_changes() -> None:
    runs = engine(vectorise=False)
    theta = runs.network.theta()
    at = flatten(theta)
    vector = torch.randn(at.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-6 * vector / vector.norm()
    ahead, behind = (
        [g.gradient for g in runs.patient_gradients(unflatten(at + s, theta), people())] for s in (step, -step)
    )
    for product, one, other in zip(
        runs.patient_products(theta, unflatten(vector, theta), people()), ahead, behind, strict=True
    ):
        assert torch.allclose((one - other) / 2e-6 * vector.norm(), product, rtol=1e-4, atol=1e-6)


def test_nobody_elses_images_touch_a_patients_row() -> None:
    """To the bit, on a CPU: each is computed by itself."""
    runs = engine(vectorise=False)
    theta = runs.network.theta()
    all_rows = [row.gradient for row in runs.patient_gradients(theta, people())]
    for number in range(len(IMAGES)):
        (alone,) = runs.patient_gradients(theta, people().take(slice(number, number + 1)))
        assert torch.equal(alone.gradient, all_rows[number])

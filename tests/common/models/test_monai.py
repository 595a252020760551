"""MONAI's classifiers by name, flat and with depth."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from common.errors import ModelError
from common.models import Network, build
from common.study import Model
from tests.common.models.maml import PATHS, by_loop

pytest.importorskip("monai")
SMALL = {"init_features": 4, "growth_rate": 2, "block_config": [1, 1]}


def _build(name: str, *, dimensions: int = 2, norm: str = "batch", **arguments: Any) -> Network:
    fields = {"name": f"monai:{name}", "norm": norm, "dimensions": dimensions, "image_size": 16}
    model = Model.model_validate(fields | {"arguments": json.dumps(arguments)})
    return build(model, classes=3, seed=0, dtype=torch.float64)


@pytest.mark.parametrize(("dimensions", "norm"), [(2, "batch"), (2, "group"), (3, "batch")])
def test_maml_gradient_of_a_densenet_is_exact(dimensions: int, norm: str) -> None:
    net = _build("DenseNet121", dimensions=dimensions, norm=norm, dropout_prob=0.5, **SMALL)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 3, 1, *[16] * dimensions, dtype=torch.float64, generator=generator)
    y = torch.arange(3).expand(2, 2, 3)
    wanted = by_loop(net.logits, net.theta(), x, y)
    for path in PATHS:
        torch.testing.assert_close(path(net.logits, net.theta(), x, y), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet10", {"widen_factor": 0.1}),
        ("SENet", {"block": "se_bottleneck", "layers": [1] * 4, "groups": 1, "reduction": 64, "inplanes": 8}),
        ("ResNet", {"block": "basic", "layers": [1] * 4, "block_inplanes": [4] * 4}),
        ("EfficientNet", {"blocks_args_str": ["r1_k3_s22_e1_i32_o16_se0.25"]}),
    ],
)
def test_classifier_of_another_family_has_no_buffers_and_its_own_names_for_sizes(
    name: str, arguments: dict[str, Any]
) -> None:
    net = _build(name, **arguments)
    assert dict(net.named_buffers()) == {}
    assert net(torch.zeros(2, 1, 16, 16, dtype=torch.float64)).shape == (2, 3)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no network 'DensNet'; near or usual: DenseNet": ("DensNet", {}),
    "no network 'drop_connect'": ("drop_connect", {}),
    "would download weights": ("DenseNet121", {"pretrained": True}),
    "sets in_channels: remove it": ("DenseNet121", {"in_channels": 1}),
    "cannot be made: .* unexpected keyword argument 'depth'": ("DenseNet121", {"depth": 3}),
    "takes no class count": ("HoVerNet", {}),
    "does not end in a linear layer": ("BasicUNet", {"features": [4] * 6}),
}


@pytest.mark.parametrize(("message", "case"), REFUSED.items(), ids=REFUSED)
def test_refusals(message: str, case: tuple[str, dict[str, Any]]) -> None:
    name, arguments = case
    with pytest.raises(ModelError, match=message):
        _build(name, **arguments)


def test_monai_is_imported_only_where_a_study_names_it() -> None:
    code = "import sys, common.models; sys.exit('monai' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""What is put side by side: theta adapted, theta as it is, the same network from scratch, simple features."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from client.adapt.classifier import Classifier, Start, steps_of_adam, steps_of_learner
from client.adapt.images import Labelled
from client.data.episodes import network_input
from common.meta.episodes import Batch
from common.meta.learner import Learner
from common.meta.metasgd import MetaSgd
from common.meta.protonet import ProtoNet
from common.models.network import Network
from common.study import Study

__all__ = ["Adapted", "Method", "Scratch", "Setting", "Simple", "Unadapted", "simple_features"]

Rows = NDArray[np.int64]
#: From rows of the labelled images to logits ``[n, C]``.
Predict = Callable[[Rows], NDArray[np.float64]]

#: What cross-validation tries besides the study's own settings: rates are multiples of the study's. Adaptation and
#: training from scratch may take as many steps.
_STEPS = (3, 10, 30, 60)
_FACTORS = (1.0, 3.0, 6.0)
_SCRATCH_STEPS = (10, 30, 60)
_SCRATCH_RATES = (0.003, 0.01, 0.03)
#: Strength of the simple model: the inverse of its L2 penalty.
_PENALTIES = (0.1, 0.003, 0.03, 1.0)
#: Side of the pictures that the simple model sees.
_SIDE = 16
_SURE = 1e-12


@dataclass(frozen=True)
class Setting:
    """What cross-validation chooses: an inner rate (of the simple model: its ``C``) and a number of steps."""

    rate: float
    steps: int


class Method(Protocol):
    """A way from labelled images to logits.

    Attributes
    ----------
    settings : tuple of Setting
        To choose from; the first is used where patients are too few to choose.
    """

    @property
    def settings(self) -> tuple[Setting, ...]: ...

    def fit(self, images: Labelled, support: Rows, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Predict]]:
        """Yield what the support rows make of each setting."""


@dataclass(frozen=True)
class Adapted:
    """The study's learner from its theta."""

    learner: Learner
    start: Start
    study: Study
    device: torch.device

    @property
    def settings(self) -> tuple[Setting, ...]:
        own = Setting(self.study.algorithm.test_rate, self.study.algorithm.test_steps)
        if isinstance(self.learner, ProtoNet):
            return (Setting(own.rate, 0),)
        rates = (own.rate,) if isinstance(self.learner, MetaSgd) else tuple(own.rate * f for f in _FACTORS)
        return tuple(dict.fromkeys([own, *(Setting(rate, steps) for rate in rates for steps in _STEPS)]))

    def fit(self, images: Labelled, support: Rows, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Predict]]:
        batch = _batch(images, support, self.device, self.start.network)
        for rate, steps in _by_rate(settings):
            for done, classifier in steps_of_learner(self.learner, self.start, batch, rate, steps):
                yield Setting(rate, done), _predict(images, classifier)

    def classifier(self, images: Labelled, support: Rows, setting: Setting) -> Classifier:
        """Return the adapted model itself."""
        batch = _batch(images, support, self.device, self.start.network)
        return next(steps_of_learner(self.learner, self.start, batch, setting.rate, [setting.steps]))[1]


@dataclass(frozen=True)
class Unadapted:
    """Theta as it is, for classes that its head knows; only its norms see the support images, no label."""

    start: Start
    device: torch.device

    @property
    def settings(self) -> tuple[Setting, ...]:
        return (Setting(1.0, 0),)

    def fit(self, images: Labelled, support: Rows, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Predict]]:
        for _, classifier in steps_of_adam(
            self.start, _batch(images, support, self.device, self.start.network), 1.0, [0]
        ):
            yield self.settings[0], _predict(images, classifier)


@dataclass(frozen=True)
class Scratch:
    """Adam from the untrained network: what the same labels give without the study."""

    start: Start
    study: Study
    device: torch.device

    @property
    def settings(self) -> tuple[Setting, ...]:
        own = Setting(self.study.episodes.scratch_rate, self.study.episodes.scratch_steps)
        grid = (Setting(rate, steps) for rate in _SCRATCH_RATES for steps in _SCRATCH_STEPS)
        return tuple(dict.fromkeys([own, *grid]))

    def fit(self, images: Labelled, support: Rows, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Predict]]:
        batch = _batch(images, support, self.device, self.start.network)
        for rate, steps in _by_rate(settings):
            for done, classifier in steps_of_adam(self.start, batch, rate, steps):
                yield Setting(rate, done), _predict(images, classifier)


@dataclass(frozen=True)
class Simple:
    """Logistic regression on small pictures and intensity statistics."""

    features: NDArray[np.float64]

    @property
    def settings(self) -> tuple[Setting, ...]:
        return tuple(Setting(penalty, 0) for penalty in _PENALTIES)

    def fit(self, images: Labelled, support: Rows, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Predict]]:
        scaler = StandardScaler().fit(self.features[support])
        x, y = scaler.transform(self.features[support]), images.labels[support]
        for setting in settings:
            model = LogisticRegression(C=setting.rate, max_iter=300, tol=1e-3).fit(x, y)

            def predict(rows: Rows, model: Any = model) -> NDArray[np.float64]:
                p = model.predict_proba(scaler.transform(self.features[rows]))
                out = np.full((len(rows), len(images.classes)), np.log(_SURE))
                out[:, model.classes_] = np.log(np.maximum(p, _SURE))
                return out

            yield setting, predict


def simple_features(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return ``[N, F]``: pixels averaged to 16 along every axis, and of every channel mean, deviation and quantiles."""
    x = torch.from_numpy(pixels).float() / 255
    pool = torch.nn.functional.adaptive_avg_pool2d if x.dim() == 4 else torch.nn.functional.adaptive_avg_pool3d
    small = pool(x, min(_SIDE, *x.shape[2:])).flatten(1)
    channels = x.flatten(2)
    quantiles = torch.quantile(channels, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]), -1).permute(1, 2, 0)
    parts = [small, channels.mean(-1), channels.std(-1), quantiles.flatten(1)]
    return np.asarray(torch.cat(parts, 1).double().numpy())


def _by_rate(settings: Sequence[Setting]) -> list[tuple[float, list[int]]]:
    """Return every rate with its numbers of steps, ascending: one run serves them all."""
    rates = dict.fromkeys(setting.rate for setting in settings)
    return [(rate, sorted({s.steps for s in settings if s.rate == rate})) for rate in rates]


def _batch(images: Labelled, rows: Rows, device: torch.device, network: Network) -> Batch:
    x = network_input(images.pixels[rows]).to(device)
    if device.type == "cpu" and network.body.channels_last and x.dim() == 4:  # faster there, see `Body`
        x = x.clone(memory_format=torch.channels_last)
    return Batch(x, torch.from_numpy(images.labels[rows]).to(device), None)


def _predict(images: Labelled, classifier: Classifier) -> Predict:
    return lambda rows: classifier.logits(network_input(images.pixels[rows]))

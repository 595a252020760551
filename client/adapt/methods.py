"""What is put side by side: theta adapted, theta as it is, the same network from scratch, simple features."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from client.adapt.classifier import Classifier, Start, learner_begins, steps_of_adam, steps_of_learner
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

#: What cross-validation tries besides the study's own settings: steps of the learner, at multiples of the study's rate,
#: and steps of Adam, the same from theta and from scratch. Where a task is unlike those of training, the learner's few
#: steps do not go far enough.
_STEPS = (3, 10, 30)
_FACTORS = (1.0, 3.0, 6.0)
_ADAM_STEPS = (10, 30, 60)
_ADAM_RATES = (0.003, 0.01, 0.03)
#: Strength of the simple model: the inverse of its L2 penalty.
_PENALTIES = (0.1, 0.003, 0.03, 1.0)
#: Side of the pictures that the simple model sees.
_SIDE = 16
_SURE = 1e-12


@dataclass(frozen=True)
class Setting:
    """What cross-validation chooses: a rate (of the simple model: its ``C``), a number of steps, and whose they are."""

    rate: float
    steps: int
    adam: bool = False


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
    """From the study's theta by the study's learner, or by Adam from where that begins."""

    learner: Learner
    start: Start
    study: Study
    device: torch.device

    @property
    def settings(self) -> tuple[Setting, ...]:
        own = Setting(self.study.algorithm.test_rate, self.study.algorithm.test_steps)
        if isinstance(self.learner, ProtoNet):
            return (Setting(own.rate, 0), *_adam_settings())
        rates = (own.rate,) if isinstance(self.learner, MetaSgd) else tuple(own.rate * f for f in _FACTORS)
        grid = (Setting(rate, steps) for rate in rates for steps in _STEPS)
        return tuple(dict.fromkeys([own, *grid, *_adam_settings()]))

    def fit(self, images: Labelled, support: Rows, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Predict]]:
        batch = _batch(images, support, self.device, self.start.network)
        for adam in (False, True):
            for rate, steps in _by_rate([setting for setting in settings if setting.adam is adam]):
                for done, classifier in self._steps(batch, rate, steps, adam=adam):
                    yield Setting(rate, done, adam), _predict(images, classifier)

    def classifier(self, images: Labelled, support: Rows, setting: Setting) -> Classifier:
        """Return the adapted model itself."""
        batch = _batch(images, support, self.device, self.start.network)
        return next(self._steps(batch, setting.rate, [setting.steps], adam=setting.adam))[1]

    def _steps(
        self, batch: Batch, rate: float, steps: Sequence[int], *, adam: bool
    ) -> Iterator[tuple[int, Classifier]]:
        if adam:
            return steps_of_adam(learner_begins(self.learner, self.start, batch), batch, rate, steps)
        return steps_of_learner(self.learner, self.start, batch, rate, steps)


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
        own = Setting(self.study.episodes.scratch_rate, self.study.episodes.scratch_steps, adam=True)
        return tuple(dict.fromkeys([own, *_adam_settings()]))

    def fit(self, images: Labelled, support: Rows, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Predict]]:
        batch = _batch(images, support, self.device, self.start.network)
        for rate, steps in _by_rate(settings):
            for done, classifier in steps_of_adam(self.start, batch, rate, steps):
                yield Setting(rate, done, adam=True), _predict(images, classifier)


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


def _adam_settings() -> tuple[Setting, ...]:
    return tuple(Setting(rate, steps, adam=True) for rate in _ADAM_RATES for steps in _ADAM_STEPS)


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

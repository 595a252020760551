"""Episodes as tensors: many tasks of one padded shape, and one task without its padding."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Batch", "Episodes", "accuracy", "cross_entropy"]


class Batch(NamedTuple):
    """Labelled images; a leading task axis where it holds several tasks.

    Attributes
    ----------
    x : Tensor
        Images ``[(T,) N, C, *]``, floating point.
    y : Tensor
        Labels ``[(T,) N]``, int64. Padding rows hold 0.
    mask : Tensor or None
        ``[(T,) N]`` bool, false on padding rows; None where no row is padding.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None


class Episodes(NamedTuple):
    """Some tasks: a support set to adapt on and a query set to be judged on, patients apart.

    Attributes
    ----------
    support, query : Batch
        With a leading task axis T.
    classes : Tensor
        ``[T, N]`` int64: the place of every way's class in the study's class list (training classes, then
        held-out ones). With a fixed head this is 0..N-1 in every row.
    """

    support: Batch
    query: Batch
    classes: Tensor

    @property
    def n_tasks(self) -> int:
        """T."""
        return self.classes.shape[0]

    def take(self, index: slice) -> "Episodes":
        """Return some of the tasks, padding included."""
        support, query = (_each(part, lambda t: t[index]) for part in (self.support, self.query))
        return Episodes(support, query, self.classes[index])

    def task(self, index: int, *, channels_last: bool = False) -> "Episodes":
        """Return one task without task axis and without padding rows (mask None).

        ``channels_last`` lays 2-D images out in that memory format; one-channel images too, for which
        ``contiguous`` would do nothing.
        """

        def rows(batch: Batch) -> Batch:
            x, y = batch.x[index], batch.y[index]
            if batch.mask is not None:
                keep = batch.mask[index]
                if not bool(keep.all()):
                    x, y = x[keep], y[keep]
            if channels_last and x.dim() == 4:
                x = x.clone(memory_format=torch.channels_last)
            return Batch(x, y, None)

        return Episodes(rows(self.support), rows(self.query), self.classes[index])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Episodes":
        """Return the tasks on a device, images in some floating-point type."""

        def move(batch: Batch) -> Batch:
            mask = None if batch.mask is None else batch.mask.to(device, non_blocking=True)
            return Batch(batch.x.to(device, dtype, non_blocking=True), batch.y.to(device, non_blocking=True), mask)

        return Episodes(move(self.support), move(self.query), self.classes.to(device))


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    mask = None if batch.mask is None else change(batch.mask)
    return Batch(change(batch.x), change(batch.y), mask)


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the rows that are not padding: a scalar."""
    if batch.mask is None:
        return F.cross_entropy(logits, batch.y)
    losses = F.cross_entropy(logits, batch.y, reduction="none")
    return torch.where(batch.mask, losses, 0.0).sum() / batch.mask.sum()


def accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the share of rows, padding left out, whose largest logit is the label: a scalar."""
    hits = (logits.argmax(-1) == batch.y).to(torch.float64)  # logits may be bfloat16: no type to count in
    if batch.mask is None:
        return hits.mean()
    return (hits * batch.mask).sum() / batch.mask.sum()

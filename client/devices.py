"""Which devices a site computes on."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["cpu_cores", "local_devices"]


def local_devices(dtype: "torch.dtype") -> "tuple[torch.device, ...]":
    """Return all CUDA devices, else Apple's GPU (which has no float64), else the CPU."""
    import torch  # here: most of the commands ask for cores only

    if torch.cuda.is_available():
        return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available() and dtype != torch.float64:
        return (torch.device("mps"),)
    return (torch.device("cpu"),)


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1

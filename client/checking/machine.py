"""Is this machine in order: versions, switches, disk, memory, GPU, clock?"""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from client.finding import Finding

__all__ = ["clock", "devices", "disk", "memory", "switches", "versions"]

#: Flower's messages and interfaces change with its minor versions.
_FLOWER = ((1, 41), (1, 43))

_GIB = 2**30


def versions() -> Iterator[Finding]:
    """Look at the versions of Python, Flower and PyTorch."""
    python = ".".join(map(str, sys.version_info[:3]))
    try:
        flower, torch = version("flwr"), version("torch")
    except PackageNotFoundError as error:
        yield Finding("versions", "fail", f"{error.name} is not installed", "install wardround from its lock again")
        return
    major, minor = (int(part) for part in flower.split(".")[:2])
    if not _FLOWER[0] <= (major, minor) < _FLOWER[1]:
        wanted = "Flower 1.41 or 1.42 is needed: install wardround from its lock again"
        yield Finding("versions", "fail", f"Flower {flower} is installed", wanted)
    else:
        yield Finding("versions", "ok", f"Python {python}, Flower {flower}, PyTorch {torch}")


def switches() -> Finding:
    """Look whether Flower may send anything to its makers from here."""
    wanted = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    missing = [f"{name}={value}" for name, value in wanted.items() if os.environ.get(name) != value]
    if missing:
        text = "Flower would send telemetry or ask for updates from here"
        return Finding("telemetry", "warn", text, f"set {' '.join(missing)} where the node is started")
    return Finding("telemetry", "ok", "Flower's telemetry and update check are off")


def disk(site: Path) -> Finding:
    """Look how much space is left where the site's folder is."""
    there = next(folder for folder in (site.absolute(), *site.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free / _GIB
    text = f"{free:.1f} GiB are free for the site's folder"
    if free < 0.1:
        return Finding("disk", "fail", text, "make room: with a full disk nothing leaves this site")
    return Finding("disk", "ok", text) if free >= 5 else Finding("disk", "warn", text, "make room for prepared pixels")


def memory() -> Finding:
    """Look how much memory is left."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20
    except (OSError, StopIteration):
        return Finding("memory", "warn", "this system does not say how much memory is free", "look yourself")
    text = f"{free:.1f} GiB of memory are free"
    return Finding("memory", "ok", text) if free >= 2 else Finding("memory", "warn", text, "end other programs")


def devices() -> Iterator[Finding]:
    """Look at what this site computes on."""
    import torch

    from client.devices import cpu_cores, local_devices

    for device in local_devices(torch.float32):
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            text = f"{torch.cuda.get_device_name(device)}: {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
            short = Finding("device", "warn", text, "end other programs on this GPU")
            yield Finding("device", "ok", text) if free > total / 2 else short
        elif device.type == "cpu" and shutil.which("nvidia-smi"):
            text = "there is an NVIDIA GPU, and PyTorch does not use it"
            yield Finding("device", "warn", text, "install the CUDA build of PyTorch, and check the driver")
        else:
            yield Finding("device", "ok", f"computes on {device.type}, {cpu_cores()} cores")


def clock(skew: float) -> Finding:
    """Judge by how many seconds this clock is ahead of the edge's: Flower refuses more than 5, or 300 behind."""
    text = f"this clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the edge's"
    # The edge tells whole seconds.
    if skew > 4 or skew < -295:
        return Finding("clock", "fail", text, "set this machine's clock by NTP: Flower refuses the node")
    return Finding("clock", "ok", text) if abs(skew) <= 3 else Finding("clock", "warn", text, "set the clock by NTP")

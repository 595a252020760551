"""What a site needs for every message of one study: built once per process, then kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from client.data.episodes import Pool, make_pool
from client.data.image import Recipe
from client.data.store import SPLITS, Site, open_site
from client.devices import cpu_cores, local_devices
from client.memory import keep_freed_memory
from common.contract import Side
from common.errors import NotPreparedError
from common.meta import Engine, head_size, make_learner
from common.meta.local_only import LocalOnly
from common.models import build, untrained
from common.paths import home
from common.privacy.site_task import check_network
from common.study import Study

__all__ = ["Session", "first_theta", "open_session", "site_folder", "virtual_site"]


@dataclass(frozen=True)
class Session:
    """One study at one site.

    Attributes
    ----------
    engine : Engine
        Runs the study's learner.
    theta : dict of str to Tensor
        The study's initial theta: names, shapes and type of what is shared.
    scratch : Engine
        Trains the same network from scratch, for comparison.
    scratch_theta : dict of str to Tensor
        Where that starts.
    """

    study: Study
    site: Site
    engine: Engine
    theta: dict[str, torch.Tensor]
    scratch: Engine
    scratch_theta: dict[str, torch.Tensor]

    @property
    def held_out(self) -> bool:
        """Whether this site never trains: all its patients are new to theta."""
        return self.site.name in self.study.sites.held_out_names

    def training_pool(self) -> Pool:
        """Return the training classes of the training patients."""
        return make_pool(self.site, self.study.episodes.class_names, 0, ("train",))

    def evaluation_pool(self, side: Side, *, new: bool) -> Pool:
        """Return the training classes, or the ``new`` ones, of one side's patients; of all where none ever trains."""
        known = self.study.episodes.class_names
        names, first = (self.study.episodes.held_out_names, len(known)) if new else (known, 0)
        return make_pool(self.site, names, first, SPLITS if self.held_out else (side,))


def virtual_site(study: Study, partition: int) -> Path:
    """Return the folder of a virtual site, as `wardround-lab prepare` writes it."""
    return home() / "virtual" / study.data_digest[:16] / f"site-{partition}"


def open_session(run_config: Mapping[str, object], node_config: Mapping[str, object]) -> Session:
    """Return the session of a message.

    Parameters
    ----------
    run_config : mapping
        The study, as Flower's run configuration.
    node_config : mapping
        ``partition-id`` in simulation; ``site``, a folder, in deployment.

    Raises
    ------
    StudyError, ModelError, NotPreparedError
        The study is not valid, its network cannot be built, or the site has no images for it.
    """
    study = Study.from_run_config(run_config)
    return _session(study, site_folder(study, node_config))


def site_folder(study: Study, node_config: Mapping[str, object]) -> Path:
    """Return the folder of a node's site; nothing in it is opened.

    Raises
    ------
    NotPreparedError
        The node was started without one.
    """
    if "site" in node_config:
        return Path(str(node_config["site"]))
    if "partition-id" in node_config:
        return virtual_site(study, int(str(node_config["partition-id"])))
    raise NotPreparedError("start this node with --node-config 'site=\"/path/of/the/site\"'")


def first_theta(study: Study) -> dict[str, torch.Tensor]:
    """Return the theta that a study begins with."""
    return _engines(study)[1]


@lru_cache(maxsize=8)
def _session(study: Study, folder: Path) -> Session:
    return Session(study, open_site(folder, Recipe.of(study.model)), *_engines(study))


@lru_cache(maxsize=8)
def _engines(study: Study) -> tuple[Engine, dict[str, torch.Tensor], Engine, dict[str, torch.Tensor]]:
    keep_freed_memory()
    dtype = torch.float64 if study.wire.dtype == "float64" else torch.float32
    devices, cores = local_devices(dtype), cpu_cores()
    learner = make_learner(study.algorithm)
    size = head_size(study.algorithm, study.episodes)
    network = build(study.model, classes=size, seed=study.study.seed, dtype=dtype)
    task_size = len(study.episodes.class_names) if study.episodes.labels == "fixed" else study.episodes.ways
    check_network(study, network)
    fresh = build(untrained(study.model), classes=task_size, seed=study.study.seed, dtype=dtype)
    return (
        Engine(learner, network, devices, cores, study.algorithm.precision),
        learner.theta(network),
        Engine(LocalOnly(study.episodes.scratch_rate), fresh, devices, cores),
        fresh.theta(),
    )

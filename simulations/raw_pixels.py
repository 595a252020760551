"""What raw pixels reach on a study's own meta-test episodes: the figure that a learner must beat.

python -m simulations.raw_pixels simulations/studies/skin-few.toml
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from client.data.episodes import draw
from client.evaluation import meta_test_generator
from client.session import open_session
from common.meta import Episodes
from common.meta.episodes import accuracy
from common.meta.protonet import prototypes
from common.study import Study
from server.cli import read_study
from simulations.prepare import prepare

__all__ = ["nearest_centroid"]

_SIDE = 16


def nearest_centroid(episodes: Episodes, ways: int) -> Tensor:
    """Return every task's query accuracy ``[T]`` of the nearest class mean on images of 16 x 16 pixels."""

    def pixels(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, _SIDE).flatten(1)

    scores = []
    for index in range(episodes.n_tasks):
        task = episodes.task(index)
        centres, present = prototypes(pixels(task.support.x), task.support, ways)
        distances = torch.cdist(pixels(task.query.x), centres)
        scores.append(accuracy(torch.where(present, -distances, -torch.inf), task.query))
    return torch.stack(scores)


def main(study: Study) -> None:
    """Print the accuracy at every site that never trains (at all sites where there is none)."""
    sites = prepare(study)
    for site in [s for s in sites if s.name in study.sites.held_out_names] or sites:
        session = open_session(study.run_config(), {"partition-id": site.index})
        for name in ("known", "new"):
            pool = session.evaluation_pool("test", new=name == "new")
            if len(pool.classes) < 2:
                continue
            generator = meta_test_generator(session, name)
            episodes = draw(site, pool, study.episodes, study.episodes.test_episodes, generator)
            ways = len(study.episodes.class_names) if study.episodes.labels == "fixed" else study.episodes.ways
            values = 100 * nearest_centroid(episodes, ways)
            half = 1.96 * float(values.std()) / len(values) ** 0.5
            print(f"{site.name}, {name} classes: {float(values.mean()):.1f} ± {half:.1f} %")


if __name__ == "__main__":
    main(read_study(Path(sys.argv[1])))

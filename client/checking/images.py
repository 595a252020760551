"""Are a site's images in order, and do they give a study's episodes?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from client.data.catalogue import open_catalogue
from client.data.keys import load_key
from client.data.report import offer
from client.finding import Finding
from common.consortium.keys import exposed
from common.errors import DataError, NotPreparedError, WardroundError
from common.study import Study

__all__ = ["catalogue", "study"]


def catalogue(site: Path) -> Iterator[Finding]:
    """Look at the catalogue, its splits, and the key that patients are known by."""
    try:
        with open_catalogue(site / "catalogue.sqlite") as opened:
            figures = offer(opened)
        load_key(site / "site.key")
    except (DataError, NotPreparedError) as error:
        yield Finding("catalogue", "fail", str(error))
        return
    patients = figures["patients"]
    text = f"{figures['pictures']} pictures, {sum(patients.values())} patients, {len(figures['classes'])} classes"
    if figures["pictures"]:
        yield Finding("catalogue", "ok", text)
    else:
        yield Finding("catalogue", "fail", text, "`wardround-site stats` says what would help")
    sides = ", ".join(f"{count} {side}" for side, count in patients.items())
    if figures["leaks"]:
        text = f"{figures['leaks']} pictures or patients are on two sides"
        yield Finding("splits", "fail", text, "set them aside with `wardround-site index --leave-out-shared`")
    elif not patients["train"]:
        yield Finding("splits", "fail", f"patients: {sides}", "no patient can train: index more, or a smaller --test")
    else:
        yield Finding("splits", "ok", f"patients: {sides}")
    if exposed((site / "site.key").stat().st_mode):
        text = "others can read site.key, by which patients are known again"
        yield Finding("site.key", "fail", text, "`chmod 600` it")


def study(plan: Study, site: Path) -> Iterator[Finding]:
    """Look whether the site has pixels prepared for a study, and can draw its episodes."""
    from client.data.episodes import draw
    from client.session import open_session
    from client.site_task import people

    name = plan.study.id
    try:
        session = open_session(plan.run_config(), {"site": str(site)})
    except WardroundError as error:
        yield Finding("cache", "fail", f"{name}: {error}")
        return
    yield Finding("cache", "ok", f"{name}: {len(session.site.slots)} pictures are prepared")
    if session.held_out:
        yield Finding("episodes", "ok", f"{name}: this site never trains; it is evaluated")
        return
    if plan.privacy.mechanism == "patient-clip":  # without episodes: every training patient is a term of a sum
        if people(session.site, plan, 1, np.ones(len(session.site.keys), np.bool_)) is None:
            yield Finding("episodes", "fail", f"{name}: no training patient has an image of the study's classes")
        else:
            yield Finding("episodes", "ok", f"{name}: there are training patients")
        return
    generator = session.site.generator("doctor", plan.digest)
    try:
        draw(session.site, session.training_pool(), plan.episodes.in_training, 1, generator)
    except DataError as error:
        yield Finding("episodes", "fail", f"{name}: {error}")
    else:
        yield Finding("episodes", "ok", f"{name}: training episodes can be drawn")

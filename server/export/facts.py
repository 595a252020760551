"""What a user of an export must know: the facts that every format carries, and the same in words."""

from typing import Any

from common.meta.fedavg import FedAvg, FedProx
from common.pixels import CENTRE, SPREAD
from common.privacy.statement import guarantee
from server.export.source import Source

__all__ = ["facts_of", "readme"]


def facts_of(source: Source) -> dict[str, Any]:
    """Return the facts, ready for JSON."""
    study = source.study
    model, episodes, algorithm = study.model, study.episodes, study.algorithm.name
    named = episodes.labels == "fixed" or algorithm in {FedAvg.name, FedProx.name}
    sizes = {"features": source.network.head.in_features, "logits": source.network.head.out_features}
    return {
        "study": {"id": study.study.id, "title": study.study.title, "digest": study.digest},
        "theta": source.digest,
        "algorithm": algorithm,
        "network": model.name,
        "privacy": guarantee(study),
        "needs_adaptation": algorithm not in {FedAvg.name, FedProx.name},
        "classes": list(episodes.class_names) if named and source.has_head else [],
        "depends_on_batch": bool(source.network.body.mixes_rows),
        "input": {
            "name": "images",
            "dtype": "float32",
            "shape": ["batch", *source.image],
            "axes": "N, C, H, W" if model.dimensions == 2 else "N, C, D, H, W",
            "colour": "RGB" if model.channels == 3 else "grey",
            "pixels": [0, 255],
            "centre": CENTRE,
            "spread": SPREAD,
            "window": model.window,
        },
        "outputs": {name: ["batch", sizes[name]] for name in source.outputs},
    }


def readme(facts: dict[str, Any], use: str) -> str:
    """Return the text that lies beside an export; ``use`` says which files there are and how they are used."""
    given, study = facts["input"], facts["study"]
    shape = " x ".join(map(str, given["shape"][1:]))
    window = "the window of the file's header" if given["window"] == "header" else f"the window `{given['window']}`"
    parts = [
        f"# {study['title'] or study['id']}",
        f"Theta of the study `{study['id']}`, as wardround's {facts['algorithm']} left it on `{facts['network']}`.",
        f"    study {study['digest']}\n    theta {facts['theta']}",
        "## What it is",
        _meaning(facts),
        "## What goes in",
        f"Images of {shape} ({given['axes'].removeprefix('N, ')}; {given['colour']}), `float32`, any number at once. "
        "Pixels are those that a display shows, 0 black to 255 white: MONOCHROME1 is inverted, a CT is shown in "
        f"{window}. They are resized with an antialiasing linear filter and rounded, and become",
        f"    x = (pixel - {given['centre']}) / {given['spread']}",
        *([_BATCH] if facts["depends_on_batch"] else []),
        "## How to use it",
        use,
        "Networks compute in float32, whatever the study trained in. Each file was loaded again after it was written "
        "and gave the outputs of wardround's own network.",
        f"Privacy: {facts['privacy']}. The licence of theta is for the study's sites to give; wardround grants none. "
        "Not for diagnosis.",
    ]
    return "\n\n".join(parts) + "\n"


def _meaning(facts: dict[str, Any]) -> str:
    classes = ", ".join(f"{i} {name}" for i, name in enumerate(facts["classes"]))
    if not facts["needs_adaptation"]:
        return f"A classifier, trained by federated averaging. Its logits are those of {classes}."
    if "logits" not in facts["outputs"]:
        return (
            "Features, without a head. Some labelled images of every class make one: c is the mean of a class's "
            "features, and an image with features f has the logit `2 f.c - c.c`. Without them it says nothing."
        )
    return (
        "A starting point of learning, not a classifier: **its logits mean nothing before adaptation** to some "
        "labelled images of the hospital at hand, by a few steps of gradient descent. The head's classes are "
        + (f"{classes}." if classes else "whatever it is adapted to.")
    )


_BATCH = (
    "**Outputs depend on the batch.** The network normalises by the statistics of the images that are given together "
    "and keeps no others, so an image's outputs change with its neighbours. Give images of one scanner together, about "
    "as many as in adaptation; a single image is at a disadvantage."
)

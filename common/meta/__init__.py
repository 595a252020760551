"""Learners, and the engine that runs them over many episodes."""

from common.meta.engine import Engine, MetaGradient, Scores, flatten, unflatten
from common.meta.episodes import Batch, Episodes
from common.meta.learner import Learner
from common.meta.registry import head_size, make_learner

__all__ = [
    "Batch",
    "Engine",
    "Episodes",
    "Learner",
    "MetaGradient",
    "Scores",
    "flatten",
    "head_size",
    "make_learner",
    "unflatten",
]

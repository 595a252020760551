"""What a site sends for a round: by the study's mechanism, and in the site's ledger."""

from pathlib import Path

import numpy as np

from client.data.episodes import draw
from client.ledger import Question, open_ledger
from client.privacy import private_gradient
from client.session import Session
from client.site_task import site_gradient
from common.contract import TRAIN, Instruction, Vector
from common.meta import Episodes
from common.models.network import Theta
from common.privacy.statement import rounds_of
from common.study import Study

__all__ = ["note_unprotected", "plain_episodes", "question", "release"]


def release(session: Session, theta: Theta, instruction: Instruction) -> tuple[Vector, dict[str, float]]:
    """Return a round's meta-gradient ``[D]`` and its scalars.

    Raises
    ------
    BudgetError
        The patients' budget does not allow it.
    StorageError
        The ledger cannot be written.
    """
    study, number = session.study, instruction.round
    gradient = _GRADIENTS[study.privacy.mechanism]
    if not study.privacy.guaranteed:
        note_unprotected(session.site.folder, study.digest)
        return gradient(session, theta, number)

    def make() -> bytes:
        return gradient(session, theta, number)[0].tobytes()

    with open_ledger(session.site.folder) as ledger:
        sent = ledger.once(question(study, instruction), make)
    return np.frombuffer(sent, study.wire.dtype), dict.fromkeys(TRAIN, -1.0)


def question(study: Study, instruction: Instruction) -> Question:
    """Return what a round's release is called in the site's ledger."""
    return Question(study.digest, instruction.round, instruction.theta, rounds_of(study))


def note_unprotected(site: Path, study: str) -> None:
    """Write down that a study takes from a site without a guarantee.

    Raises
    ------
    BudgetError
        The site has a budget.
    """
    with open_ledger(site) as ledger:
        ledger.unprotected(study)


def plain_episodes(session: Session, number: int) -> Episodes:
    """Return the episodes of a round in a study without a mechanism."""
    spec, pool = session.study.episodes.in_training, session.training_pool()
    generator = session.site.generator("train", session.study.digest, number)
    return draw(session.site, pool, spec, spec.per_round, generator, augment=True)


def _plain_gradient(session: Session, theta: Theta, number: int) -> tuple[Vector, dict[str, float]]:
    """Return a round's mean meta-gradient, query loss and query accuracy, as they are."""
    result = session.engine.meta_gradient(theta, plain_episodes(session, number))
    return np.asarray(result.gradient), {"loss": float(result.loss), "accuracy": float(result.accuracy)}


_GRADIENTS = {"none": _plain_gradient, "episode-clip": private_gradient, "patient-clip": site_gradient}

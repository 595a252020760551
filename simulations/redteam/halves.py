"""Runs of a study with random halves of its patients: models to attack, and models to know what others would say."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from client.data.catalogue import open_catalogue
from client.data.keys import KEY_BYTES
from client.session import Session, virtual_site
from common.models.network import Theta
from common.study import Study
from server.record import run_folder
from simulations.engines.inprocess import run_in_process
from simulations.redteam.oracle import patients
from simulations.redteam.scene import copies

__all__ = ["Half", "run_half"]


@dataclass(frozen=True)
class Half:
    """A run with every training patient in it or not, by a fair coin of their own.

    Attributes
    ----------
    theta : dict of str to Tensor
        What the run published.
    inside : tuple of ndarray
        For every site, ``[P]``: which of its `patients` were there.
    """

    theta: Theta
    inside: tuple[NDArray[np.bool_], ...]


def run_half(study: Study, sessions: Sequence[Session], generator: np.random.Generator) -> Half:
    """Run a study with the real apps on copies of its virtual sites; of the patients left out, nothing is there.

    The sites have new keys: whoever knew the keys of a site's other runs would know its patients' coins, and no
    guarantee covers that.

    Raises
    ------
    RoundError
        Too few sites have enough patients left.
    """
    inside = tuple(generator.random(len(patients(session))) < 0.5 for session in sessions)
    with copies(study), redirect_stdout(StringIO()):  # a line a round
        for number, (session, here) in enumerate(zip(sessions, inside, strict=True)):
            folder = virtual_site(study, number)
            _leave_out(folder, [session.site.keys[patient] for patient in patients(session)[~here]])
            (folder / "site.key").write_bytes(generator.bytes(KEY_BYTES))
        run_id, _ = run_in_process(study)
        return Half(load_file(run_folder(run_id) / "theta.safetensors"), inside)


def _leave_out(folder: Path, keys: Sequence[bytes]) -> None:
    with open_catalogue(folder / "catalogue.sqlite", new={}) as catalogue, catalogue.transaction():
        change = "UPDATE image SET aside = 'left out of this run' WHERE patient = ?"
        catalogue.database.executemany(change, [(key,) for key in keys])

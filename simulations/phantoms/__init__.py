"""Phantom hospitals: DICOM archives of patients who never were, the same bytes from the same seed."""

from simulations.phantoms.hospital import write_hospital
from simulations.phantoms.lesions import LESIONS
from simulations.phantoms.scanners import SCANNERS, Scanner

__all__ = ["LESIONS", "SCANNERS", "Scanner", "write_hospital"]

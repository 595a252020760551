"""Images from a hospital's archive (PACS) into an intake folder, which `wardround-site index` then reads."""

from client.pacs.intake import Intake, open_intake

__all__ = ["Intake", "open_intake"]

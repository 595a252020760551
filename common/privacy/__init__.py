"""Differential privacy as pure maths: accounting, the mechanisms' arithmetic, and audits of both.

Nothing here reads data or draws randomness of its own; what a site does with it is in ``client``. Derivations:
``docs/privacy.md``.
"""

"""Attacks on what sites really send, each beside the bound that the study's guarantee puts on it.

``wardround-lab redteam`` runs them. A study runs with the real apps, every message is kept (`scene`), and each attack
sees what an honest but curious coordinator sees: the study, theta, and the answers. Who was really in a round
(`oracle`) is for scoring only. `docs/privacy.md` has what was measured.
"""

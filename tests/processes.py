"""Processes that start at once, because whoever forks them has imported everything already."""

import multiprocessing

__all__ = ["CONTEXT"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.deploy.players", "tests.server.spool", "server.app", "torch._dynamo"]  # an optimiser wants the last
)

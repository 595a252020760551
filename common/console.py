"""How the commands speak: errors in one sentence to stderr, exit codes that mean something."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from common.errors import StudyError, WardroundError

__all__ = ["plain_errors"]

P = ParamSpec("P")
R = TypeVar("R")


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a refusal into its sentence and an exit code: 2 for a bad study file, 1 for a failed run."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except WardroundError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2 if isinstance(error, StudyError) else 1) from None
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None

    return run

"""Going on with a run that was interrupted: a new Flower run that starts from the last checkpoint."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common.environment import flower_environment
from common.errors import NotPreparedError, RoundError
from common.study import Study
from server.record import run_folder

__all__ = ["resume_on_flower", "study_of_run"]


def study_of_run(run: int) -> Study:
    """Return the study that a run is of.

    Raises
    ------
    NotPreparedError
        There is no such run on this machine.
    """
    path = run_folder(run) / "study.json"
    try:
        return Study.from_run_config(json.loads(path.read_bytes())["study"])
    except FileNotFoundError:
        raise NotPreparedError(f"there is no run {run} here: {path} is missing") from None


def resume_on_flower(run: int, *, app: Path, superlink: str, federation: str | None) -> None:
    """Go on with a run through ``flwr run`` and wait for its end.

    Parameters
    ----------
    run : int
        The run whose folder is continued.
    app : Path
        The folder with wardround's ``pyproject.toml``.
    superlink : str
        The name of a connection in Flower's configuration.
    federation : str or None
        Flower's ``--federation-config``; None leaves it out.

    Raises
    ------
    NotPreparedError
        There is no such run on this machine.
    RoundError
        Flower could not start the run, or the run did not end with a result.
    """
    folder, study = run_folder(run), study_of_run(run)
    with tempfile.TemporaryDirectory(prefix="wardround-") as name:
        plan = Path(name) / "resume.toml"
        plan.write_text(f'resume = "{run}"\n\n{study.toml()}', encoding="utf-8")
        beside = Path(sys.executable).with_name("flwr")
        command = [str(beside) if beside.exists() else "flwr", "run", str(app), superlink, "--stream"]
        command += ["--run-config", str(plan), *(["--federation-config", federation] if federation else [])]
        done = subprocess.run(command, env=flower_environment(), check=False)
    # Flower's exit code is 0 also where the run failed.
    if done.returncode or not (folder / "result.json").exists():
        reason = folder / "failure.txt"
        said = reason.read_text(encoding="utf-8") if reason.exists() else "see what Flower printed above"
        raise RoundError(f"run {run} did not end with a result: {said}")

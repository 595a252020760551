"""Going on with a run that was interrupted: a new Flower run that starts from the last checkpoint."""

import subprocess
import tempfile
from pathlib import Path

from common.environment import flower_environment, tool
from common.errors import RoundError, StudyError
from common.study import Study
from server.record import run_folder
from server.runs import read_json, recorded_study

__all__ = ["resume_on_flower", "resumed_plan"]


def resumed_plan(study: Study, run: int | str) -> str:
    """Return the run configuration (TOML) that goes on with a run."""
    return f'resume = "{run}"\n\n{study.toml()}'


def resume_on_flower(folder: Path, *, app: Path, superlink: str, federation: str | None) -> None:
    """Go on with a run through ``flwr run`` and wait for its end.

    Parameters
    ----------
    folder : Path
        The run's, under the runs of this machine: its name is the run's id.
    app : Path
        The folder with wardround's ``pyproject.toml``.
    superlink : str
        The name of a connection in Flower's configuration.
    federation : str or None
        Flower's ``--federation-config``; None leaves it out.

    Raises
    ------
    StudyError
        The folder is not a run's, or its study was changed.
    RoundError
        The run has its result already, Flower could not start it, or it did not end with a result.
    """
    study = recorded_study(folder)
    if run_folder(folder.name) != folder.resolve():
        raise StudyError(
            f"{folder} is not under {run_folder(folder.name).parent}, where runs are resumed: move it there"
        )
    if read_json(folder / "status.json").get("state") == "finished":
        raise RoundError(f"the run in {folder} has its result already")
    with tempfile.TemporaryDirectory(prefix="wardround-") as name:
        plan = Path(name) / "resume.toml"
        plan.write_text(resumed_plan(study, folder.name), encoding="utf-8")
        command = [tool("flwr"), "run", str(app), superlink, "--stream"]
        command += ["--run-config", str(plan), *(["--federation-config", federation] if federation else [])]
        done = subprocess.run(command, env=flower_environment(), check=False)
    # Flower's exit code is 0 also where the run failed.
    if done.returncode or read_json(folder / "status.json").get("state") != "finished":
        reason = folder / "failure.txt"
        said = reason.read_text(encoding="utf-8") if reason.exists() else "see what Flower printed above"
        raise RoundError(f"the run in {folder} did not end with a result: {said}")

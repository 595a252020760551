"""The ServerApp: thin; everything is in `server.rounds`."""

from collections.abc import Callable
from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import WardroundError
from common.study import Study
from server.record import RunRecord, run_folder
from server.report import write_report
from server.rounds import run_study

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that Flower's run configuration holds, or go on with the run that its key ``resume`` names."""
    config = context.run_config
    study, earlier, track = Study.from_run_config(config), str(config.get("resume", "")), str(config.get("track", ""))
    say = partial(print, flush=True)
    record = RunRecord(run_folder(earlier or context.run_id), study, resume=bool(earlier))
    record.status(state="joining", run_id=context.run_id)
    try:
        run_study(grid, study, record, say, resume=bool(earlier), track=track)
    except WardroundError as error:
        record.fail(str(error))
        _report(record, say)
        raise
    except BaseException:
        record.status(state="stopped")
        raise
    record.status(state="reporting")
    _report(record, say)
    record.status(state="finished")


def _report(record: RunRecord, say: Callable[[str], None]) -> None:
    try:
        write_report(record.folder)
    except Exception as error:  # what the run came to is there already, and a report can be written again
        say(f"no report ({type(error).__name__}: {error}): `wardround-study report {record.folder.name}` tries again")

"""The ServerApp: thin; everything is in `server.rounds`."""

from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import WardroundError
from common.study import Study
from server.record import RunRecord, run_folder
from server.rounds import run_study

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that Flower's run configuration holds, or go on with the run that its key ``resume`` names."""
    study, earlier = Study.from_run_config(context.run_config), str(context.run_config.get("resume", ""))
    folder = run_folder(int(earlier or context.run_id))
    record = RunRecord(folder, study, resume=bool(earlier))
    record.status(state="joining", run_id=context.run_id)
    try:
        run_study(grid, study, record, partial(print, flush=True), resume=bool(earlier))
    except WardroundError as error:
        record.fail(str(error))
        raise
    except BaseException:
        record.status(state="stopped")
        raise
    record.status(state="finished")

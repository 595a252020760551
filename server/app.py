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
    """Run the study that Flower's run configuration holds."""
    study = Study.from_run_config(context.run_config)
    record = RunRecord(run_folder(context.run_id), study)
    try:
        run_study(grid, study, record, partial(print, flush=True))
    except WardroundError as error:
        record.fail(str(error))
        raise

"""MLflow: one run of the experiment ``wardround``, on a server or in a folder."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.study import Study
from server.tracking.tracker import Line, round_figures, site_figures

__all__ = ["MLflow"]


class MLflow:
    def __init__(self, value: str, folder: Path, study: Study) -> None:
        # Before MLflow is imported: it sends nothing home, and gives up early.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        early = {"TIMEOUT": "5", "MAX_RETRIES": "1", "BACKOFF_FACTOR": "1"}
        for name, number in early.items():
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", number)
        from mlflow import MlflowClient

        self._make = MlflowClient
        self._uri = value if re.match(r"[a-z]+:", value) else Path(value).resolve().as_uri()
        if self._uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._name, self._study = folder.resolve().name, study
        self._client: Any = None
        self._run = ""

    def round(self, line: Line) -> None:
        figures = {f"round/{name}": value for name, value in round_figures(line).items()}
        self._log(figures | {f"{name}/{_plain(site)}": value for site, name, value in site_figures(line)}, line)

    def evaluation(self, line: Line) -> None:
        side = line.get("side", "test")
        self._log({f"{side}.{name}/{_plain(site)}": value for site, name, value in site_figures(line)}, line)

    def finish(self, result: Line) -> None:
        self._connect()
        self._client.set_tag(self._run, "wardround.theta", str(result.get("theta", "")))
        self._client.set_terminated(self._run, "FINISHED")

    def close(self) -> None:
        if self._client and self._client.get_run(self._run).info.status == "RUNNING":
            self._client.set_terminated(self._run, "KILLED")

    def _log(self, figures: Mapping[str, float], line: Line) -> None:
        from mlflow.entities import Metric

        self._connect()
        at = int(1000 * line["at"]) if "at" in line else 0
        metrics = [Metric(name, value, at, line["round"]) for name, value in figures.items()]
        for k in range(0, len(metrics), 1000):  # MLflow takes no more at once
            self._client.log_batch(self._run, metrics[k : k + 1000])

    def _connect(self) -> None:
        """Find the run that this one goes on with, or make one: only now, as a server may be slow to answer."""
        if self._client is not None:
            return
        from mlflow.entities import Param

        client = self._make(tracking_uri=self._uri)
        experiment = client.get_experiment_by_name("wardround")
        number = experiment.experiment_id if experiment else client.create_experiment("wardround")
        found = client.search_runs([number], f"tags.`wardround.run` = '{self._name}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, "RUNNING")
        else:
            tags = {"wardround.run": self._name, "wardround.study": self._study.digest}
            self._run = client.create_run(
                number, tags=tags, run_name=f"{self._study.study.id} {self._name}"
            ).info.run_id
            params = [Param(key, str(value)[:6000]) for key, value in self._study.run_config().items()]
            for k in range(0, len(params), 100):  # MLflow takes no more at once
                client.log_batch(self._run, params=params[k : k + 100])
        self._client = client


def _plain(name: str) -> str:
    """Return a name that MLflow takes; a site's may hold anything."""
    return re.sub(r"[^\w\-. :]", "_", name, flags=re.ASCII)

"""TensorBoard: an events file in the run's folder."""

from pathlib import Path

from common.study import Study
from server.runs import lines
from server.tracking.tracker import Line, round_figures, site_figures

__all__ = ["TensorBoard"]


class TensorBoard:
    def __init__(self, value: str, folder: Path, study: Study) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # A resumed run may go back: what is there from later rounds no longer counts.
        done = max((line["round"] for line in lines(folder / "history.jsonl")), default=0)
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        self._writer.add_text("study", "    " + study.toml().replace("\n", "\n    "))

    def round(self, line: Line) -> None:
        for name, value in round_figures(line).items():
            self._add(f"round/{name}", value, line)
        for site, name, value in site_figures(line):
            self._add(f"{name}/{site}", value, line)
        self._writer.flush()

    def evaluation(self, line: Line) -> None:
        for site, name, value in site_figures(line):
            if name.endswith(".mean"):
                self._add(f"{line.get('side', 'test')}.{name.removesuffix('.mean')}/{site}", value, line)
        self._writer.flush()

    def finish(self, result: Line) -> None:
        self._writer.add_text("theta", str(result.get("theta", "")))

    def close(self) -> None:
        self._writer.close()

    def _add(self, tag: str, value: float, line: Line) -> None:
        self._writer.add_scalar(tag, value, line["round"], line.get("at"))

"""Adapting and predicting where there is no network at all, not even a loopback that is up."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.adapt.test_cli import write_pictures
from tests.client.adapt.worlds import images, study, write_run

# What is chosen from is of no matter here, and takes most of the time.
QUICK = "import client.adapt.methods as m; m._ADAM_STEPS, m._ADAM_RATES, m._PENALTIES = (0,), (0.01,), (0.03,)"
START = f"import torch; torch.set_num_threads(1); {QUICK}; from client.cli import app; app()"
ALONE = ["unshare", "--map-root-user", "--net", sys.executable, "-c", START]


@pytest.mark.slow
def test_adapt_and_predict_need_no_network(tmp_path: Path) -> None:
    if not shutil.which("unshare") or subprocess.run([*ALONE[:3], "true"], check=False).returncode:
        pytest.skip("unshare (util-linux) and the right to use it are needed to cut the network off, Linux only")
    # No steps, so that it takes no time: prototypes, and a network from scratch that stays as it is.
    plan = study({"algorithm.name": "protonet", "episodes.scratch-steps": 0})
    pictures, site = write_pictures(tmp_path, images(6, 1)), ["--site", str(tmp_path / "site"), "--json"]
    labels = ["--labels", str(tmp_path / "labels.csv"), "--map", "who=patient", "--shots", "2"]
    model = str(write_run(tmp_path / "run", plan))
    adapt = [*ALONE, "adapt", str(pictures), "--model", model, "--out", str(tmp_path / "out"), *labels, *site]
    done = subprocess.run(adapt, capture_output=True, text=True, timeout=300, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == report["exit"], done.stderr
    assert "methods" in report
    out = str(tmp_path / "p.csv")
    predict = [*ALONE, "predict", str(pictures), "--model", str(tmp_path / "out"), "--anyway", "--out", out, *site]
    done = subprocess.run(predict, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 18

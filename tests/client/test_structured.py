"""Structured reports: read back by highdicom, they reference the source and say what the records say."""

from pathlib import Path

import pydicom
import pytest
from pydicom.uid import ComprehensiveSRStorage

from client.adapt.folder import AdaptedModel
from client.predict import predict, reports
from simulations.phantoms.hospital import write_hospital
from simulations.phantoms.scanners import SCANNERS
from tests.client.test_predict import KEY, folder, model, rows

sr = pytest.importorskip("highdicom.sr")
__all__ = ["folder", "model"]


def test_every_instance_has_a_report_that_says_the_same(model: AdaptedModel, tmp_path: Path) -> None:
    write_hospital(tmp_path, scanner=SCANNERS[0], lesions=("disc", "ring"), patients_per_lesion=2, seed=0, size=32)
    (tmp_path / "dicom" / "notes.txt").write_text("no image")
    paths, more = [tmp_path / "dicom"], {"skip": tmp_path / "site", "workers": 1}
    predict(model, KEY, paths, tmp_path / "out.jsonl", **more)  # type: ignore[arg-type]
    counts = reports(model, KEY, paths, tmp_path / "out.sr", **more)  # type: ignore[arg-type]
    expected = {row["file"]: row for row in rows(tmp_path / "out.jsonl")}
    instances = {pydicom.dcmread(name).SOPInstanceUID: row for name, row in expected.items() if not row["reason"]}
    written = sorted((tmp_path / "out.sr").iterdir())
    assert (counts.images, counts.refused) == (len(written), 1)
    assert len(written) == len(instances)
    seen = set()
    for path in written:
        assert path.stat().st_mode & 0o077 == 0
        report = sr.srread(path)
        assert report.SOPClassUID == ComprehensiveSRStorage
        assert report.VerificationFlag == "UNVERIFIED"
        [group] = report.content.get_image_measurement_groups()
        [reference] = group.source_images
        uid = reference.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
        assert evidence.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == uid
        row = instances[uid]
        values = {m.name.meaning: m.value for m in group.get_measurements()}
        for name in model.classes:
            assert values[f"Probability of {name}"] == row[f"p {name}"]
            assert values[f"Lower bound of probability of {name}"] == row[f"low {name}"]
        said = {e.name.meaning: e.value.meaning for e in group.get_qualitative_evaluations()}
        assert said["Most probable class"] == row["class"]
        assert said["Conformal set, 90%"] == (row["set"].replace(";", ", ") or "no class")
        assert said["Unlike the images adapted to"] == ("Yes" if row["unlike"] else "No")
        seen.add(uid)
    assert seen == set(instances)
    again = reports(model, KEY, paths, tmp_path / "out.sr", **more)  # type: ignore[arg-type]
    assert (again.before, again.images) == (len(written), 0)

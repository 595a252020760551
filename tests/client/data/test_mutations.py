"""Damaged files end in the right pixels or in none: valid phantoms with headers changed and ends cut off."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread

from client.data.picture import Reading, Reason
from client.data.worker import Entry, Task, Work, read
from simulations.phantoms import SCANNERS, write_hospital
from tests.client.data.folders import KEY, RECIPE, cached, indexed, rows

WORK = Work(KEY, Reading(), (RECIPE,))

#: What a picture legitimately depends on, besides the transfer syntax and the pixels.
_RENDERING = (
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType", "VOILUTSequence", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "PresentationLUTShape", "PixelPresentation", "Modality", "SOPClassUID",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelData", "FloatPixelData",
    "DoubleFloatPixelData",
    *(f"{c}PaletteColorLookupTable{what}" for c in ("Red", "Green", "Blue") for what in ("Descriptor", "Data")),
    *(f"Segmented{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue")),
)  # fmt: skip


@dataclass(frozen=True)
class Valid:
    data: bytes
    header: int
    pixels: bytes
    content: bytes
    rendering: dict[str, Any]


def entries(path: Path) -> list[Entry | Reason]:
    return list(read(WORK, Task((path,), path.name)))


def rendering(path: Path) -> dict[str, Any] | None:
    """Return what the picture depends on, as pydicom reads it without any of our checks; None where it cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = dcmread(path, force=True)
            found = {name: plain(dataset, name) for name in _RENDERING}
            return found | {"syntax": str(dataset.file_meta.get("TransferSyntaxUID"))}
        except Exception:
            return None


def plain(dataset: Dataset, name: str) -> Any:
    element = dataset.get(name)
    return element if isinstance(element, bytes) else str(element)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> list[Valid]:
    out = []
    for number, scanner in enumerate(SCANNERS):
        folder = tmp_path_factory.mktemp(scanner.name)
        write_hospital(folder, scanner=scanner, lesions=("disc",), patients_per_lesion=1, seed=number, size=32)
        path = min((folder / "dicom").rglob("*.dcm"))
        data = path.read_bytes()
        [entry] = entries(path)
        assert isinstance(entry, Entry)
        known = rendering(path)
        assert known is not None
        assert entry.pixels[0] is not None
        # A deflated file has no bare pixel element: all of it is header.
        at = data.rfind(b"\xe0\x7f\x10\x00")
        out.append(Valid(data, at if at > 0 else len(data), entry.pixels[0], entry.content, known))
    return out


def mutated(one: Valid, draw: st.DataObject) -> bytes:
    data = bytearray(one.data)
    places = st.integers(128, one.header + 12)
    for _ in range(draw.draw(st.integers(1, 3), "changes")):
        place = min(draw.draw(places, "place"), len(data) - 1)
        how = draw.draw(st.sampled_from(["byte", "bit", "zeros", "ones", "insert", "remove"]), "how")
        if how == "byte":
            data[place] = draw.draw(st.integers(0, 255), "byte")
        elif how == "bit":
            data[place] ^= 1 << draw.draw(st.integers(0, 7), "bit")
        elif how in ("zeros", "ones"):
            data[place : place + 4] = (b"\0" if how == "zeros" else b"\xff") * 4
        elif how == "insert":
            data[place:place] = draw.draw(st.binary(min_size=1, max_size=4), "bytes")
        else:
            del data[place : place + draw.draw(st.integers(1, 8), "count")]
    return bytes(data)


@settings(max_examples=300)
@given(draw=st.data())
def test_changed_headers_never_give_a_wrong_picture(
    valid: list[Valid], tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    one = valid[draw.draw(st.integers(0, len(valid) - 1), "scanner")]
    path = tmp_path_factory.getbasetemp() / "changed.dcm"
    path.write_bytes(mutated(one, draw))
    found = entries(path)
    assert 1 <= len(found) <= 100_000
    if any(isinstance(entry, Reason) for entry in found):
        assert isinstance(found[-1], Reason)
        return
    if rendering(path) == one.rendering:
        assert [entry.pixels[0] for entry in found if isinstance(entry, Entry)] == [one.pixels]
        assert [entry.content for entry in found if isinstance(entry, Entry)] == [one.content]


@settings(max_examples=100)
@given(scanner=st.integers(0, len(SCANNERS) - 1), share=st.floats(0, 1, exclude_max=True))
def test_what_is_cut_off_is_whole_or_refused(
    valid: list[Valid], tmp_path_factory: pytest.TempPathFactory, scanner: int, share: float
) -> None:
    one = valid[scanner]
    path = tmp_path_factory.getbasetemp() / "cut.dcm"
    path.write_bytes(one.data[: int(share * len(one.data))])
    [entry] = entries(path)
    if isinstance(entry, Entry):  # only what comes after the pixels is missing
        assert (entry.pixels, entry.content) == ((one.pixels,), one.content)


@settings(max_examples=3)
@given(draw=st.data())
def test_a_folder_of_damaged_files_is_indexed_to_its_end(
    valid: list[Valid], tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "in").mkdir()
    for number, one in enumerate(valid):
        (folder / "in" / f"{number}-whole.dcm").write_bytes(one.data)
        (folder / "in" / f"{number}-changed.dcm").write_bytes(mutated(one, draw))
        (folder / "in" / f"{number}-cut.dcm").write_bytes(
            one.data[: draw.draw(st.integers(0, len(one.data) - 1), "cut")]
        )
    counts = indexed(folder, folder / "in", seconds=20.0, workers=2)
    assert counts.files == 3 * len(valid)
    assert counts.read >= len(valid)
    assert not {reason for _, reason in counts.refusals} & {Reason.CRASHED, Reason.TOO_SLOW}
    stored = rows(folder / "site", "SELECT slot, content FROM image")
    by_content = {one.content: one.pixels for one in valid}
    pixels = cached(folder / "site")
    assert len(pixels) == len(stored)
    shown = {slot: pixels[slot - 1].tobytes() for slot, _ in stored}
    whole = [by_content[content] == shown[slot] for slot, content in stored if content in by_content]
    assert np.sum(whole) >= len(valid)

"""What a process remembers of the pictures before changes nothing of those that follow."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from client.data import memo, windows
from client.data.windows import rendering, show

HEADERS: list[dict[str, Any]] = [
    {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 1, "RescaleIntercept": -1024},
    {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 2, "RescaleIntercept": -1024},
    {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 1, "RescaleIntercept": -1024, "Modality": "MR"},
    {"WindowCenter": 300, "WindowWidth": 9, "VOILUTFunction": "SIGMOID"},
    {"WindowCenter": 40, "WindowWidth": 400, "PixelPaddingValue": 100, "PixelPaddingRangeLimit": 300},
    {"WindowCenter": [40, 50], "WindowWidth": [400, 300]},
    {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": "1e306", "RescaleIntercept": 0},
    {},
]


def dataset(at: int, dtype: str, inverted: bool) -> Dataset:
    out = Dataset()
    out.file_meta = FileMetaDataset()
    out.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    elements = {
        "Modality": "CT",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME1" if inverted else "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "PixelRepresentation": int(dtype == "int16"),
        **HEADERS[at],
    }
    for keyword, value in elements.items():
        setattr(out, keyword, value)
    return out


def forget() -> None:
    windows._SEEN.clear()
    windows._TABLES.clear()


def shown(header: Dataset, stored: NDArray[np.generic], window: str) -> NDArray[np.float32] | None:
    try:
        with np.errstate(all="ignore"):
            return show(stored, rendering(header, 0), window)
    except ValueError:
        return None


KINDS = [
    (at, dtype, inverted, window)
    for at in range(len(HEADERS))
    for dtype in ("uint16", "int16")
    for inverted in (False, True)
    for window in ("header", "brain", "bone")
]
#: The numbers of one picture after the other: within, below, above and around those before, and far away.
RANGES = [(1000, 1100), (1020, 1060), (940, 1030), (1050, 1149), (0, 30), (930, 1060), (30_000, 32_000)]


def test_every_picture_is_shown_as_if_it_were_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    cases = []
    for low, high in RANGES:
        for at, dtype, inverted, window in KINDS:
            stored = generator.integers(low, high, (12, 13), dtype, endpoint=True)
            cases.append((dataset(at, dtype, inverted), stored, window))
    alone = []
    for case in cases:
        forget()
        alone.append(shown(*case))
    forget()
    monkeypatch.setattr(memo, "_MOST", len(KINDS))
    for case, expected in zip(cases, alone, strict=True):
        found = shown(*case)
        if found is None or expected is None:
            assert found is expected
        else:
            np.testing.assert_array_equal(found, expected)
    assert any(picture is None for picture in alone)


def test_tables_are_used_again_and_forgotten_before_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    calls = []
    grey = windows.grey

    def counted(numbers: NDArray[np.generic], header: Dataset) -> windows.Grey:
        calls.append(numbers.size)
        return grey(numbers, header)

    monkeypatch.setattr(windows, "grey", counted)
    low, high = (np.arange(first, first + 64, dtype=np.uint16).reshape(8, 8) for first in (0, 1000))
    for stored in (low, high, low, high, low[:4]):
        shown(dataset(0, "uint16", False), stored, "header")
    assert calls == [64, 1064]
    for intercept in range(100):
        header = dataset(0, "uint16", False)
        header.RescaleIntercept = intercept
        shown(header, low, "header")
    assert len(windows._SEEN) <= 32
    assert len(windows._TABLES) <= 32

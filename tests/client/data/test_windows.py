"""What a process remembers of the pictures before changes nothing of those that follow."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from client.data import windows
from client.data.windows import rendering, show

HEADERS: list[dict[str, Any]] = [
    {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 1, "RescaleIntercept": -1024},
    {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 2, "RescaleIntercept": -1024},
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


PICTURES = st.tuples(
    st.integers(0, len(HEADERS) - 1),
    st.sampled_from(["uint16", "int16"]),
    st.booleans(),
    st.sampled_from(["header", "brain", "bone"]),
    st.integers(0, 2**15 - 1),
    st.sampled_from([1, 5, 100, 40_000]),
    st.integers(0, 2**32 - 1),
)


@given(st.lists(PICTURES, min_size=1, max_size=8))
def test_every_picture_is_shown_as_if_it_were_the_first(
    pictures: list[tuple[int, str, bool, str, int, int, int]],
) -> None:
    forget()
    cases = []
    for at, dtype, inverted, window, least, extent, seed in pictures:
        limits = np.iinfo(dtype)
        low = limits.min + 2 * least if dtype == "int16" else 2 * least
        high = min(low + extent, limits.max)
        stored = np.random.default_rng(seed).integers(low, high, (12, 13), dtype, endpoint=True)
        header = dataset(at, dtype, inverted)
        cases.append((header, stored, window, shown(header, stored, window)))
    for header, stored, window, then in cases:
        forget()
        alone = shown(header, stored, window)
        if alone is None or then is None:
            assert alone is then
        else:
            np.testing.assert_array_equal(alone, then)


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

"""The page of a site: what is on it, what must not be, and how it is written."""

import base64
import io
import os
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data.catalogue import open_catalogue
from client.data.image import Recipe
from client.data.page import write_page
from client.data.picture import Header, Reason
from client.data.report import offer
from client.data.worker import Entry
from common.errors import DataError
from tests.client.data.handmade import KEY, patients, picture, write_site

HOSTILE = "</td><script>alert('x')</script><img src=x onerror=\"alert(1)\">&lt;[/b]\x1b[31m"
RECIPE = Recipe(1, 6)


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and its text without the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._style = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data

    @property
    def thumbnails(self) -> list[Image.Image]:
        sources = [str(about["src"]) for tag, about in self.elements if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(s.removeprefix("data:image/png;base64,")))) for s in sources]


def page_of(site: Path, to: Path) -> str:
    with open_catalogue(site / "catalogue.sqlite") as catalogue:
        write_page(to, site, catalogue, offer(catalogue))
    return to.read_text()


def page_with(
    folder: Path, pictures: Sequence[Entry], recipe: Recipe | None = None, refused: Sequence[Reason] = ()
) -> Parsed:
    return Parsed(page_of(write_site(folder / "site", pictures, recipe=recipe, refused=refused), folder / "page.html"))


def some(label: str, number: int, shade: int = 0, header: Header | None = None, recipe: Recipe = RECIPE) -> list[Entry]:
    """Return a picture of each of some training patients, every one a shade lighter."""
    return [
        picture(who, label, header, shade=shade + k, recipe=recipe) for k, who in enumerate(patients("train", number))
    ]


def test_nothing_from_a_file_is_markup(tmp_path: Path) -> None:
    plain = page_with(tmp_path, some("a", 3), RECIPE)
    (tmp_path / "hostile").mkdir()
    header = Header(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    hostile = page_with(tmp_path / "hostile", some(HOSTILE, 3, header=header), RECIPE)
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(about) for _, about in hostile.elements] == [sorted(about) for _, about in plain.elements]
    shown = HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    # As a class, under its pictures, modality, scanner (maker and model).
    assert hostile.text.count(shown) == 5


def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    page = page_with(tmp_path, some("a", 3), RECIPE)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "form", "a"}
    assert all(str(about["src"]).startswith("data:image/png;base64,") for tag, about in page.elements if tag == "img")
    raw = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|url\(|@import|file:", raw)
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_no_path_and_no_hash_is_on_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "CANARY"
    folder.mkdir()
    page_with(folder, [*some("a", 3), picture(None, "a", recipe=RECIPE)], RECIPE, [Reason.DAMAGED])
    raw = (folder / "page.html").read_bytes()
    hashes = [KEY, *patients("train", 3), (1000).to_bytes(16, "big")]
    shapes = [form for h in hashes for form in (h, h.hex().encode(), base64.b64encode(h)[:20])]
    for form in [b"CANARY", str(tmp_path).encode(), RECIPE.digest.encode(), *shapes]:
        assert form not in raw


def test_thumbnails_are_of_pictures_that_episodes_may_hold_one_a_patient(tmp_path: Path) -> None:
    (who,) = patients("train", 1)
    pictures = [
        *some("a", 12, shade=10),
        picture(who, "a", shade=99, recipe=RECIPE),  # that patient's second
        *some("b", 2, shade=100),
        picture(None, "b", shade=200, recipe=RECIPE),
        picture(who, None, shade=201, recipe=RECIPE),
    ]
    page = page_with(tmp_path, pictures, RECIPE)
    shades = [int(np.unique(np.asarray(image)).item()) for image in page.thumbnails]
    assert shades == [*range(10, 18), 100, 101]
    assert all(image.size == (6, 6) for image in page.thumbnails)
    alts = [about["alt"] for tag, about in page.elements if tag == "img"]
    assert alts == [*(f"a, example {k}" for k in range(1, 9)), "b, example 1", "b, example 2"]


def test_training_patients_are_shown_first(tmp_path: Path) -> None:
    tested = [picture(who, "a", shade=k, recipe=RECIPE) for k, who in enumerate(patients("test", 8))]
    page = page_with(tmp_path, [*tested, *some("a", 3, shade=100)], RECIPE)
    assert [int(np.asarray(image)[0, 0]) for image in page.thumbnails] == [100, 101, 102, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("recipe", "mode", "size"),
    [(Recipe(3, 6), "RGB", (6, 6)), (Recipe(1, 300), "L", (224, 224)), (Recipe(1, 6, 3), "L", (6, 6))],
)
def test_colour_large_pictures_and_volumes(tmp_path: Path, recipe: Recipe, mode: str, size: tuple[int, int]) -> None:
    page = page_with(tmp_path, some("a", 1, recipe=recipe), recipe)
    (image,) = page.thumbnails
    assert (image.mode, image.size) == (mode, size)
    assert ("middle slice" in page.text) == (recipe.dimensions == 3)


def test_without_prepared_pixels_the_page_says_how_to_get_thumbnails(tmp_path: Path) -> None:
    page = page_with(tmp_path, [picture(who, "a") for who in patients("train", 2)])
    assert page.thumbnails == []
    assert "run wardround-site index with --study" in page.text


def test_the_page_tells_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    pictures = [*some("nv", 6, header=Header("XC", "Maker", "Lens")), *some("mel", 4), picture(None, "nv")]
    page = page_with(tmp_path, pictures, None, [Reason.CRASHED])
    words = re.sub(r"\s+", " ", page.text)
    for sentence in (
        "It must stay at this site.", "up to 2 ways", "Maker Lens", "XC", "not said", Reason.CRASHED.value,
        "no patient", "map one to it", "largest K",
    ):  # fmt: skip
        assert sentence in words
    (language,) = (about["lang"] for tag, about in page.elements if tag == "html")
    assert language == "en"


def test_an_empty_site_has_a_page(tmp_path: Path) -> None:
    page = page_with(tmp_path, [], None, [Reason.DAMAGED])
    assert "No picture is ready" in page.text
    assert Reason.DAMAGED.value in page.text


def test_long_lists_end(tmp_path: Path) -> None:
    (who,) = patients("train", 1)
    pictures = [picture(who, f"class {k:03}", Header("CT", "Maker", f"{k}"), recipe=RECIPE) for k in range(100)]
    page = page_with(tmp_path, pictures, RECIPE)
    assert len(page.thumbnails) == 40
    assert "the first 40 of 100 classes" in page.text
    assert "and 75 more, together 75" in page.text


def test_the_same_site_has_the_same_page(tmp_path: Path) -> None:
    site = write_site(tmp_path / "site", some("a", 12), recipe=RECIPE)
    assert page_of(site, tmp_path / "1.html") == page_of(site, tmp_path / "2.html")


def test_only_its_owner_can_read_the_page(tmp_path: Path) -> None:
    site = write_site(tmp_path / "site", some("a", 2), recipe=RECIPE)
    before = tmp_path / "page.html"
    before.write_text("old")
    before.chmod(0o644)
    page_of(site, before)
    assert before.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "site"]


def test_a_page_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = write_site(tmp_path / "site", some("a", 2), recipe=RECIPE)
    page = tmp_path / "page.html"
    page.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="has space") as caught:
        page_of(site, page)
    assert str(tmp_path) not in str(caught.value)
    assert page.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "site"]


def test_a_folder_that_is_not_there_is_explained(tmp_path: Path) -> None:
    site = write_site(tmp_path / "site", [])
    with pytest.raises(DataError, match="its folder exists"):
        page_of(site, tmp_path / "nowhere" / "page.html")

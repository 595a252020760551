"""Labelled images from a site's catalogue: the classes asked for, the patients' own hashes, whom theta has seen."""

import numpy as np
import pytest

from client.adapt.images import from_site
from client.data.catalogue import open_catalogue
from client.data.image import Recipe
from client.data.store import Site
from common.errors import DataError
from common.study import Study


@pytest.mark.parametrize("took_part", [True, False])
def test_images_are_those_of_the_catalogue(study: Study, sites: list[Site], took_part: bool) -> None:
    site, recipe = sites[3], Recipe.of(study.model)
    those = from_site(site.folder, recipe, ("c", "a"), took_part=took_part)
    assert those.classes == ("c", "a")
    with open_catalogue(site.folder / "catalogue.sqlite") as catalogue:
        query = (
            "SELECT slot, patient, label, split FROM image WHERE aside IS NULL AND label IN ('a', 'c') ORDER BY slot"
        )
        rows = catalogue.database.execute(query).fetchall()
    assert len(rows) == len(those.labels) > 0
    for at, (slot, patient, label, split) in enumerate(rows):
        np.testing.assert_array_equal(those.pixels[at], site.cache[slot - 1])
        assert those.classes[those.labels[at]] == label
        assert those.hashes[those.patients[at]] == patient.hex()
        assert those.unseen[at] == (not took_part or split != "train")


def test_a_class_that_nobody_has_is_named(study: Study, sites: list[Site]) -> None:
    with pytest.raises(DataError, match="no image has the label 'z'; there are: a, b"):
        from_site(sites[3].folder, Recipe.of(study.model), ("a", "z"), took_part=False)
    with pytest.raises(DataError, match="two classes"):
        from_site(sites[3].folder, Recipe.of(study.model), ("a",), took_part=False)
    assert from_site(sites[3].folder, Recipe.of(study.model), (), took_part=False).classes == sites[3].label_names

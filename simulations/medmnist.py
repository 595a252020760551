"""What is published about the MedMNIST sets: checksums, class names, tasks and licences.

The facts are those of release 3.0.2 of the sets, so a file in anybody's cache can be told from a damaged or
an altered one without asking a server.

References
----------
Yang et al. 2023, "MedMNIST v2 - A large-scale lightweight benchmark for 2D and 3D biomedical image
classification", Scientific Data 10:41; sizes above 28: Zenodo record 10519652.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["SETS", "MedMnistSet", "file_name", "url"]

RECORD = "https://zenodo.org/records/10519652/files"

Task = Literal["binary-class", "multi-class", "multi-label", "ordinal-regression"]

_SIZES = (28, 64, 128, 224)


@dataclass(frozen=True)
class MedMnistSet:
    """One set as published.

    Parameters
    ----------
    task
        Kind of label. Only ``multi-label`` has more than one label an image.
    n_channels
        1 (grey) or 3 (RGB).
    licence
        Licence of the images, as short name.
    label_names
        Class names, in the order of the label numbers.
    md5
        Checksum of the published file for every side length in pixels (voxels for the volumes).
    """

    task: Task
    n_channels: int
    licence: str
    label_names: tuple[str, ...]
    md5: Mapping[int, str]


def file_name(name: str, size: int) -> str:
    """Return the published file name, which is also the name in a cache: ``bloodmnist_64.npz``."""
    return f"{name}.npz" if size == 28 else f"{name}_{size}.npz"


def url(name: str, size: int) -> str:
    """Return the address of the published file."""
    return f"{RECORD}/{file_name(name, size)}?download=1"


def _published(task: Task, n_channels: int, licence: str, labels: str, *md5: str) -> MedMnistSet:
    """Return one row of the table; the checksums stand in the order of the sizes."""
    return MedMnistSet(task, n_channels, licence, tuple(labels.split("|")), dict(zip(_SIZES, md5, strict=False)))


# The three planes of the organ set share their order; the volumes of the same organs have another one.
_ORGANS = "bladder|femur-left|femur-right|heart|kidney-left|kidney-right|liver|lung-left|lung-right|pancreas|spleen"

SETS: dict[str, MedMnistSet] = {
    "pathmnist": _published(
        "multi-class",
        3,
        "CC BY 4.0",
        "adipose|background|debris|lymphocytes|mucus|smooth muscle|normal colon mucosa"
        "|cancer-associated stroma|colorectal adenocarcinoma epithelium",
        "a8b06965200029087d5bd730944a56c1",
        "55aa9c1e0525abe5a6b9d8343a507616",
        "ac42d08fb904d92c244187169d1fd1d9",
        "2c51a510bcdc9cf8ddb2af93af1eadec",
    ),
    "chestmnist": _published(
        "multi-label",
        1,
        "CC BY 4.0",
        "atelectasis|cardiomegaly|effusion|infiltration|mass|nodule|pneumonia|pneumothorax|consolidation"
        "|edema|emphysema|fibrosis|pleural|hernia",
        "02c8a6516a18b556561a56cbdd36c4a8",
        "9de6cd0b934ebb5b7426cfba5efbae16",
        "db107e5590b27930b62dbaf558aebee3",
        "45bd33e6f06c3e8cdb481c74a89152aa",
    ),
    "dermamnist": _published(
        "multi-class",
        3,
        "CC BY-NC 4.0",
        "actinic keratoses and intraepithelial carcinoma|basal cell carcinoma"
        "|benign keratosis-like lesions|dermatofibroma|melanoma|melanocytic nevi|vascular lesions",
        "0744692d530f8e62ec473284d019b0c7",
        "b70a2f5635c6199aeaa28c31d7202e1f",
        "2defd784463fa5243564e855ed717de1",
        "8974907d8e169bef5f5b96bc506ae45d",
    ),
    "octmnist": _published(
        "multi-class",
        1,
        "CC BY 4.0",
        "choroidal neovascularization|diabetic macular edema|drusen|normal",
        "c68d92d5b585d8d81f7112f81e2d0842",
        "e229e9440236b774d9f0dfef9d07bdaf",
        "0a97e76651ace45c5d943ee3f65b63ae",
        "abc493b6d529d5de7569faaef2773ba3",
    ),
    "pneumoniamnist": _published(
        "binary-class",
        1,
        "CC BY 4.0",
        "normal|pneumonia",
        "28209eda62fecd6e6a2d98b1501bb15f",
        "8f4eceb4ccffa70c672198ea285246c6",
        "05b46931834c231683c68f40c47b2971",
        "d6a3c71de1b945ea11211b03746c1fe1",
    ),
    "retinamnist": _published(
        "ordinal-regression",
        3,
        "CC BY 4.0",
        "0|1|2|3|4",
        "bd4c0672f1bba3e3a89f0e4e876791e4",
        "afda852cc34dcda56f86ad2b2457dbcc",
        "e48e916a24454daf90583d4e6efb1a18",
        "eae7e3b6f3fcbda4ae613ebdcbe35348",
    ),
    "breastmnist": _published(
        "binary-class",
        1,
        "CC BY 4.0",
        "malignant|normal, benign",
        "750601b1f35ba3300ea97c75c52ff8f6",
        "742edef2a1fd1524b2efff4bd7ba9364",
        "363e4b3f8d712e9b5de15470a2aaadf1",
        "b56378a6eefa9fed602bb16d192d4c8b",
    ),
    "bloodmnist": _published(
        "multi-class",
        3,
        "CC BY 4.0",
        "basophil|eosinophil|erythroblast"
        "|immature granulocytes(myelocytes, metamyelocytes and promyelocytes)|lymphocyte|monocyte"
        "|neutrophil|platelet",
        "7053d0359d879ad8a5505303e11de1dc",
        "2b94928a2ae4916078ca51e05b6b800b",
        "adace1e0ed228fccda1f39692059dd4c",
        "b718ff6835fcbdb22ba9eacccd7b2601",
    ),
    "tissuemnist": _published(
        "multi-class",
        1,
        "CC BY 4.0",
        "Collecting Duct, Connecting Tubule|Distal Convoluted Tubule|Glomerular endothelial cells"
        "|Interstitial endothelial cells|Leukocytes|Podocytes|Proximal Tubule Segments"
        "|Thick Ascending Limb",
        "ebe78ee8b05294063de985d821c1c34b",
        "123ece2eba09d0aa5d698fda57103344",
        "61b955355d7425a89687b06cca3ce0c2",
        "b077128c4a949f0a4eb01517f9037b9c",
    ),
    "organamnist": _published(
        "multi-class",
        1,
        "CC BY 4.0",
        _ORGANS,
        "68e3f8846a6bd62f0c9bf841c0d9eacc",
        "2dcccc29b88e6da5a01161ef20cda288",
        "eeae80d0a227a8d099027e1b3cfd3b60",
        "50747347e05c87dd3aaf92c49f9f3170",
    ),
    "organcmnist": _published(
        "multi-class",
        1,
        "CC BY 4.0",
        _ORGANS,
        "b9ceb9546e10131b32923c5bbeaea2b1",
        "3ce34a8724ea6f548e6db4744d03b6a9",
        "773c1f009daa3fe5d9a2a201b2a7ed94",
        "050f5e875dc056f6768abf94ec9995d1",
    ),
    "organsmnist": _published(
        "multi-class",
        1,
        "CC BY 4.0",
        _ORGANS,
        "9ab87b696fb54e2a387ebe992d6ed5f1",
        "53a6d115339d874c25e309a994ff46d3",
        "ded0c5fa01a95dc4978b956f613e9b8e",
        "b354719e553fbbb2513d5533f52a4cb1",
    ),
    "organmnist3d": _published(
        "multi-class",
        1,
        "CC BY 4.0",
        "liver|kidney-right|kidney-left|femur-right|femur-left|bladder|heart|lung-right|lung-left|spleen|pancreas",
        "a0c5a1ff56af4f155c46d46fbb45a2fe",
        "58a2205adf14a9d0a189cb06dc78bf10",
    ),
    "nodulemnist3d": _published(
        "binary-class",
        1,
        "CC BY 4.0",
        "benign|malignant",
        "8755a7e9e05a4d9ce80a24c3e7a256f3",
        "c47c5b7d457bf6332200d2ea6d64ecd8",
    ),
    "adrenalmnist3d": _published(
        "binary-class",
        1,
        "CC BY 4.0",
        "normal|hyperplasia",
        "bbd3c5a5576322bc4cdfea780653b1ce",
        "17721accfe9fb005146a47d33bc54b2f",
    ),
    "fracturemnist3d": _published(
        "multi-class",
        1,
        "CC BY 4.0",
        "buckle rib fracture|nondisplaced rib fracture|displaced rib fracture",
        "6aa7b0143a6b42da40027a9dda61302f",
        "f01d7e6316aedf4210da0da5b7437b42",
    ),
    "vesselmnist3d": _published(
        "binary-class",
        1,
        "CC BY 4.0",
        "vessel|aneurysm",
        "b41fd4f7e7e2feedddb201585ecafa1b",
        "6bb274a8846e1097066dcd64e2c4520f",
    ),
    "synapsemnist3d": _published(
        "binary-class",
        1,
        "CC BY 4.0",
        "inhibitory synapse|excitatory synapse",
        "1235b78a3cd6280881dd7850a78eadb6",
        "43bd14ebf3af9d3dd072446fedc14d5e",
    ),
}

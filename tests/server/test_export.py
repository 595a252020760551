"""An export is theta for whoever has no wardround: loaded elsewhere it gives the same outputs, or it is not written."""

import copy
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from client.adapt.trained import read_trained
from client.data.image import Recipe, prepare
from common.errors import ExportError
from common.meta import head_size, make_learner
from common.meta.autodiff import EAGER
from common.meta.episodes import Batch
from common.models import Network, build
from common.quiet import quiet
from common.study import Study
from server.cli import app
from server.export import Format, export_run, write
from server.record import run_folder
from tests.server.finished import finished_run

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("monai")

ROOT = Path(__file__).parents[2]
DENSENET = json.dumps({"init_features": 4, "growth_rate": 2, "block_config": [1, 1]})
RESNET = json.dumps({"block": "basic", "layers": [1] * 4, "block_inplanes": [2] * 4})
CASES: dict[str, dict[str, bool | int | float | str]] = {
    "conv4-batch": {"algorithm.name": "maml", "wire.dtype": "float64"},
    "conv4-group": {"algorithm.name": "protonet", "model.norm": "group", "model.channels": 3, "model.image-size": 20},
    "resnet12": {"algorithm.name": "metasgd", "model.name": "resnet12"},
    "monai-2d": {"algorithm.name": "fedavg", "model.name": "monai:DenseNet121", "model.arguments": DENSENET},
    "monai-3d": {
        "algorithm.name": "maml", "model.name": "monai:ResNet", "model.arguments": RESNET, "model.dimensions": 3,
        "episodes.labels": "fixed", "episodes.held-out": "",
    },
}  # fmt: skip
SLOW = {"resnet12", "monai-2d", "monai-3d"}
SIZES = (1, 2, 7)


@dataclass(frozen=True)
class Case:
    name: str
    study: Study
    theta: dict[str, Tensor]
    folder: Path
    done: write.Exported

    @property
    def network(self) -> Network:
        dtype = next(iter(self.theta.values())).dtype
        classes = head_size(self.study.algorithm, self.study.episodes)
        return build(self.study.model, classes=classes, seed=5, dtype=dtype)

    @property
    def image(self) -> tuple[int, ...]:
        return Recipe.of(self.study.model).shape

    def pixels(self, count: int) -> Tensor:
        return torch.randint(0, 256, (count, *self.image), generator=torch.Generator().manual_seed(count)).byte()

    def program(self) -> torch.nn.Module:
        with quiet("torch.export"):
            return cast(torch.nn.Module, torch.export.load(self.folder / "model.pt2").module())


def scaled(pixels: Tensor) -> Tensor:
    """As `client.data.episodes` does it, which tests of its own hold."""
    return (pixels.float() - 127.5) / 63.75


Exports = Callable[[str], Case]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    root = tmp_path_factory.mktemp("exports")

    @cache
    def make(name: str) -> Case:
        study = finished_run(root / name, CASES[name])
        done = export_run(root / name, root / name / "export", [*Format])
        return Case(name, study, load_file(root / name / "theta.safetensors"), done.folder, done)

    return make


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES])
def case(request: pytest.FixtureRequest, exports: Exports) -> Case:
    return exports(request.param)


@pytest.fixture(scope="module")
def elsewhere(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], dict[str, Tensor]]:
    """What a fresh process without wardround gets from the files of a case."""

    @cache
    def load(slow: bool) -> dict[str, Tensor]:
        folder = tmp_path_factory.mktemp("elsewhere")
        cases = [exports(name) for name in CASES if (name in SLOW) is slow]
        images = {f"{case.name}/{size}": case.pixels(size) for case in cases for size in SIZES}
        save_file(images, folder / "images.safetensors")
        files = [folder / "images.safetensors", folder / "out.safetensors", *(case.folder for case in cases)]
        program = Path(__file__).with_name("outsider.py")
        subprocess.run([sys.executable, "-I", str(program), *map(str, files)], check=True, cwd=folder)
        return load_file(folder / "out.safetensors")

    def of(case: Case) -> dict[str, Tensor]:
        found = load(case.name in SLOW)
        return {key.removeprefix(f"{case.name}/"): v for key, v in found.items() if key.startswith(f"{case.name}/")}

    return of


Elsewhere = Callable[[Case], dict[str, Tensor]]


@pytest.mark.parametrize("size", SIZES)
def test_every_format_gives_the_outputs_of_theta_elsewhere(case: Case, elsewhere: Elsewhere, size: int) -> None:
    theta = {name: value.double() for name, value in case.theta.items()}
    x = scaled(case.pixels(size)).double()
    wanted = {"features": case.network.features(theta, x)}
    if case.study.algorithm.name != "protonet":
        wanted["logits"] = case.network.logits(theta, x)
    found = {key.removeprefix(f"{size}/"): v for key, v in elsewhere(case).items() if key.startswith(f"{size}/")}
    outputs = [f"{format_}/{name}" for format_ in ("torch", "onnx") for name in wanted]
    assert set(found) == {*outputs, "monai/pred"}
    for key, value in found.items():
        _, _, name = key.partition("/")
        right = [*wanted.values()][-1] if name == "pred" else wanted[name]
        assert value.dtype == torch.float32
        # Features can be large, logits are held to 1e-5 as such.
        torch.testing.assert_close(value.double(), right, atol=1e-5, rtol=1e-5 if name == "features" else 0)


def test_bundle_runs_on_pictures_elsewhere(exports: Exports, elsewhere: Elsewhere) -> None:
    for case in (exports("conv4-batch"), exports("conv4-group")):
        found = elsewhere(case)
        torch.testing.assert_close(found["workflow"], found["7/monai/pred"], atol=1e-5, rtol=0)


def test_facts_are_in_every_format(case: Case) -> None:
    facts, study = case.done.facts, case.study
    with safe_open(case.folder / "theta.safetensors", "pt") as file:
        assert json.loads(file.metadata()["wardround"]) == facts
    extra = {"wardround.json": ""}
    with quiet("torch.export"):
        torch.export.load(case.folder / "model.pt2", extra_files=extra)
    assert json.loads(extra["wardround.json"]) == facts
    properties = {p.key: p.value for p in onnx.load(case.folder / "model.onnx").metadata_props}
    assert json.loads(properties["wardround"]) == facts
    metadata = json.loads((case.folder / f"{study.study.id}-bundle" / "configs" / "metadata.json").read_text())
    assert metadata["wardround"] == facts
    assert facts["study"]["digest"] == study.digest
    assert facts["theta"] == json.loads((case.folder.parent / "result.json").read_text())["theta"]
    scale = facts["input"]
    ends = torch.tensor([0, 255])
    assert torch.equal((ends - scale["centre"]) / scale["spread"], scaled(ends))
    assert scale["shape"][1:] == list(case.image)
    assert Study.from_toml((case.folder / "study.toml").read_text()) == study


def test_theta_is_exported_whole_and_in_its_own_type(case: Case) -> None:
    saved = load_file(case.folder / "theta.safetensors")
    assert saved.keys() == case.theta.keys()
    assert all(saved[n].dtype == t.dtype and torch.equal(saved[n], t) for n, t in case.theta.items())
    network = {n: t.float() for n, t in case.theta.items() if not n.startswith("rate.")}
    program = case.program().state_dict()
    weights = torch.load(case.folder / f"{case.study.study.id}-bundle" / "models" / "model.pt", weights_only=True)
    for found in (program, weights):
        assert found.keys() == network.keys()
        assert all(torch.equal(found[name], value) for name, value in network.items())


def test_no_file_names_a_folder_of_this_machine(case: Case) -> None:
    for path in case.folder.rglob("*"):
        parts = [path.read_bytes()] if path.is_file() else []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts += [archive.read(name) for name in archive.namelist()]
        for part in parts:
            for folder in (ROOT, case.folder.parent, Path(torch.__file__).parent):
                assert str(folder).encode() not in part, path


def test_outputs_depend_on_the_batch_exactly_where_the_export_says_so(case: Case) -> None:
    program, x = case.program(), scaled(case.pixels(4))
    together, alone = program(x)["features"][:1], program(x[:1])["features"]
    said = case.done.facts["depends_on_batch"]
    assert said == (case.study.model.norm == "batch")
    assert said == (not torch.allclose(together, alone, atol=1e-5))
    assert said == ("depend on the batch" in (case.folder / "README.md").read_text())


def episode(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Support images, their labels, query images."""
    x, ways = scaled(case.pixels(12)), case.study.episodes.ways
    return x[: 2 * ways], torch.arange(ways).repeat(2), x[2 * ways :]


def adapted(case: Case) -> Tensor:
    """The query logits of the study's own learner."""
    x, y, query = (value.double() if value.is_floating_point() else value for value in episode(case))
    theta = {name: value.double() for name, value in case.theta.items()}
    network, learner = case.network.double(), make_learner(case.study.algorithm)
    state = learner.adapt(network, theta, Batch(x, y, None), torch.arange(3), case.study.algorithm.test_steps, EAGER)
    with torch.no_grad():
        return learner.predict(network, state, Batch(query, y[:6], None))


@pytest.mark.parametrize("name", ["conv4-batch", pytest.param("resnet12", marks=pytest.mark.slow)])
def test_program_can_be_adapted_as_the_learner_does(exports: Exports, name: str) -> None:
    case = exports(name)
    x, y, query = episode(case)
    program, plan = case.program(), case.study.algorithm
    rates = load_file(case.folder / "theta.safetensors")
    before = program(query)["logits"]
    for _ in range(plan.test_steps):
        program.zero_grad()
        F.cross_entropy(program(x)["logits"], y).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for key, p in program.named_parameters():
                assert p.grad is not None
                p.sub_(rates.get(f"rate.{key}", torch.tensor(plan.test_rate)).float() * p.grad)
    wanted = adapted(case)
    assert (before - wanted).abs().max() > 1e-3
    torch.testing.assert_close(program(query)["logits"].double(), wanted, atol=2e-5, rtol=0)


def test_features_make_the_logits_of_a_prototype_learner(exports: Exports) -> None:
    case = exports("conv4-group")
    x, y, query = episode(case)
    program = case.program()
    f, g = program(x)["features"], program(query)["features"]
    c = torch.stack([f[y == way].mean(0) for way in range(3)])
    readme = (case.folder / "README.md").read_text()
    assert "2 f.c - c.c" in readme
    torch.testing.assert_close((2 * g @ c.T - (c * c).sum(-1)).double(), adapted(case), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("name", "said"), [
    ("conv4-batch", "mean nothing before adaptation"), ("conv4-group", "without a head"),
    pytest.param("monai-2d", "A classifier, trained by federated averaging. Its logits are those of 0 disc, 1 ring",
                 marks=pytest.mark.slow),
    pytest.param("monai-3d", "The head's classes are 0 disc, 1 ring", marks=pytest.mark.slow),
])  # fmt: skip
def test_readme_says_what_the_outputs_mean(exports: Exports, name: str, said: str) -> None:
    case = exports(name)
    bundle = case.folder / f"{case.study.study.id}-bundle"
    for file in (case.folder / "README.md", bundle / "docs" / "README.md"):
        assert said in file.read_text()


def test_bundle_has_what_the_specification_demands(case: Case) -> None:
    root = case.folder / f"{case.study.study.id}-bundle"
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "models/model.pt2",
        "docs/README.md",
    }  # fmt: skip
    metadata = json.loads((root / "configs" / "metadata.json").read_text())
    texts = {
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "task",
        "description",
        "authors",
        "copyright",
    }
    assert all(isinstance(metadata[key], str) and metadata[key] for key in texts)
    assert isinstance(metadata["required_packages_version"], dict)
    tensors = metadata["network_data_format"]
    assert tensors["inputs"].keys() == {"image"}
    assert tensors["outputs"].keys() == {"pred"}
    for tensor in (tensors["inputs"]["image"], tensors["outputs"]["pred"]):
        assert {
            "type": str, "format": str, "modality": str, "num_channels": int, "spatial_shape": list, "dtype": str,
            "value_range": list, "is_patch_data": bool, "channel_def": dict,
        } == {key: type(value) for key, value in tensor.items()}  # fmt: skip
    assert tensors["inputs"]["image"]["spatial_shape"] == list(case.image[1:])


@pytest.mark.parametrize("size", [(16, 16), (31, 50), (9, 12)], ids=str)
@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
@pytest.mark.parametrize("name", ["conv4-batch", "conv4-group"])
def test_bundle_prepares_pictures_as_a_site_does(
    exports: Exports, tmp_path: Path, name: str, colour: bool, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3) if colour else size, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    check_preparation(exports(name), tmp_path / "a.png", pixels)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 16, 16), (9, 31, 20)], ids=str)
def test_bundle_prepares_volumes_as_a_site_does(exports: Exports, tmp_path: Path, size: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    check_preparation(exports("monai-3d"), tmp_path / "a.npy", pixels)


def check_preparation(case: Case, file: Path, pixels: NDArray[np.uint8]) -> None:
    from monai.bundle.config_parser import ConfigParser

    parser = ConfigParser()
    parser.read_config(case.folder / f"{case.study.study.id}-bundle" / "configs" / "inference.json")
    with quiet("monai"):  # MONAI warns of readers that it could have
        found = parser.get_parsed_content("preprocessing")({"image": str(file)})["image"]
    recipe = Recipe.of(case.study.model)
    wanted = scaled(
        torch.from_numpy(prepare((pixels / 255).astype(np.float32), recipe, volume=recipe.dimensions == 3).copy())
    )
    assert type(found) is Tensor
    off = ((found - wanted).abs() * 63.75).round()
    assert off.max() <= 1  # where rounding is a near tie
    assert (off > 0).float().mean() < 0.02


# What is refused, and that nothing is left.


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    finished_run(tmp_path / "run", {"algorithm.name": "maml"})
    return tmp_path / "run"


def refused(run: Path, reason: str, formats: Sequence[Format] = (Format.SAFETENSORS,)) -> None:
    with pytest.raises(ExportError, match=reason):
        export_run(run, run.parent / "out", formats)
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unfinished_run_is_refused(a_run: Path) -> None:
    (a_run / "result.json").unlink()
    refused(a_run, "has no result")


def test_a_changed_theta_is_refused(a_run: Path) -> None:
    path = a_run / "theta.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    refused(a_run, "is not the theta that the run ended with")
    theta = load_file(path)
    for wrong in ({**theta, "more": torch.ones(1)}, {n: t.double() for n, t in theta.items()},
                  {n: t.flatten() for n, t in theta.items()}, dict(list(theta.items())[1:])):  # fmt: skip
        save_file(wrong, path)
        refused(a_run, "is not the theta that the run ended with")
    path.write_bytes(before[:-1])
    refused(a_run, "cannot be read")
    path.unlink()
    refused(a_run, "cannot be read")


@pytest.mark.parametrize("file", ["study.json", "result.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff"])
def test_damaged_records_are_refused(a_run: Path, file: str, text: str) -> None:
    (a_run / file).write_text(text)
    refused(a_run, "cannot be read|not what a run writes|is not the study that was run")


def test_a_changed_study_is_refused(a_run: Path) -> None:
    record = json.loads((a_run / "study.json").read_text())
    change_json(a_run / "study.json", study=record["study"] | {"algorithm.name": "fomaml"})
    refused(a_run, "is not the study that was run")
    changed = Study.from_run_config(record["study"] | {"algorithm.name": "fomaml"})
    change_json(a_run / "study.json", digest=changed.digest)  # consistent, but not what the result is of
    refused(a_run, "is not the study that was run")


def test_a_result_of_another_theta_is_refused(a_run: Path) -> None:
    change_json(a_run / "result.json", theta="0" * 64)
    refused(a_run, "is not the theta that the run ended with")


def test_local_only_has_nothing_to_export(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", {"algorithm.name": "local-only"})
    refused(tmp_path / "run", "learns nothing that sites share")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(a_run: Path, kind: str) -> None:
    out = a_run / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to("nowhere")
    with pytest.raises(ExportError, match="exists already: remove it, or name another folder with --to"):
        export_run(a_run, out, [Format.SAFETENSORS])
    assert os.path.lexists(out)


@pytest.mark.parametrize("error", [ExportError("no"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_nothing(a_run: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    seen = []

    def broken(source: object, facts: object, folder: Path) -> Any:
        (folder / "half").write_text("half")
        seen.append(folder)
        raise error

    monkeypatch.setitem(write._WRITERS, Format.ONNX, broken)
    with pytest.raises((ExportError, KeyboardInterrupt), match=r"^no$|No space left|^$"):
        export_run(a_run, a_run.parent / "out", [Format.SAFETENSORS, Format.ONNX])
    assert seen[0].parent == a_run.parent  # the same file system: a rename is enough
    assert [path.name for path in a_run.parent.iterdir()] == ["run"]


FULL = """
import resource, signal, sys
from pathlib import Path
from common.errors import ExportError
from server.export import Format, export_run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for format_ in Format:
    try:
        export_run(Path(sys.argv[1]), Path(sys.argv[2]), [format_])
    except ExportError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_full_disk_is_a_sentence(a_run: Path) -> None:
    out = a_run.parent / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(a_run), str(out)],
        check=True, capture_output=True, text=True, env=environment, cwd=a_run.parent,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"the export cannot be written to {out}: File too large"] * 4
    assert [path.name for path in a_run.parent.iterdir()] == ["run"]


def wrong_by(difference: float) -> Any:
    """A writer whose format, loaded again, gives outputs that are wrong in one place."""

    def write_wrong(source: Any, facts: object, folder: Path) -> Any:
        network = copy.deepcopy(source.network).double()

        def predict(images: Tensor) -> dict[str, Tensor]:
            out = source.predict(network, images)
            if len(images) == 1:
                out["logits"][0, 1] += difference
            return dict(out)

        return predict

    return write_wrong


@pytest.mark.parametrize("difference", [1e-3, -2e-5, float("nan"), float("inf")])
def test_a_format_that_gives_something_else_is_not_written(
    a_run: Path, monkeypatch: pytest.MonkeyPatch, difference: float
) -> None:
    monkeypatch.setitem(write._WRITERS, Format.ONNX, wrong_by(difference))
    refused(a_run, "the onnx export gives other logits than theta does", [Format.SAFETENSORS, Format.ONNX])


def test_differences_are_those_that_are_reported(a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(write._WRITERS, Format.ONNX, wrong_by(5e-6))
    done = export_run(a_run, a_run.parent / "out", [Format.ONNX])
    assert done.differences == {Format.ONNX: {"features": 0, "logits": pytest.approx(5e-6, rel=1e-6)}}


def test_another_epsilon_in_the_plain_norm_is_noticed(a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.export.plain.EPSILON", 1e-3)
    refused(a_run, "the torch export gives other features than theta does", [Format.TORCH])


@pytest.mark.parametrize(("format_", "package", "advice"), [
    (Format.ONNX, "onnxruntime", r"pip install 'wardround\[export\]'"), (Format.ONNX, "onnxscript", "export"),
    (Format.MONAI, "monai", "leave monai out with --format"),
])  # fmt: skip
def test_a_missing_package_is_named(
    a_run: Path, monkeypatch: pytest.MonkeyPatch, format_: Format, package: str, advice: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(a_run, f"{package}.*{advice}", [format_])


def test_a_network_that_cannot_be_traced_is_refused_in_words(a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.export.plain.Plain.outputs", lambda _, x: {"features": x * float(x.sum())})
    refused(a_run, "PyTorch cannot trace this network .*use --format safetensors", [Format.TORCH])


# The command.


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *arguments])
    return result.exit_code, result.output


def test_command_takes_a_number_and_a_folder() -> None:
    study = finished_run(run_folder(77), {"algorithm.name": "maml", "wire.dtype": "float64"})
    code, output = command("77", "--format", "safetensors", "--format", "safetensors")
    assert code == 0, output
    assert "safetensors  loaded again, logits differ by at most 0.0e+00" in output
    assert "mean nothing before adaptation" in output
    out = run_folder(77) / "export"
    assert {path.name for path in out.iterdir()} == {"README.md", "theta.safetensors", "study.toml", "study.json"}
    trained = read_trained(out)  # what a site adapts
    digest = json.loads((run_folder(77) / "result.json").read_text())["theta"]
    assert (trained.study, trained.theta_digest) == (study, digest)
    code, output = command(
        str(run_folder(77)), "--to", str(out / "deeper" / "still"), "--format", "safetensors", "--json"
    )
    assert code == 0, output
    answer = json.loads(output)
    assert answer["folder"] == str(out / "deeper" / "still")
    assert answer["study"]["digest"] == study.digest
    assert answer["differences"] == {"safetensors": {"features": 0.0, "logits": 0.0}}
    code, output = command("77", "--format", "safetensors")
    assert code == 1
    assert "exists already" in output


@pytest.mark.parametrize("run", ["78", ".", "no/such/folder", "\u0663"])
def test_command_of_no_run(run: str) -> None:
    code, output = command(run)
    assert code == 2
    assert f"there is no run {run}" in output

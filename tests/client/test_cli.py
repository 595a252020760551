"""`wardround-site` as people and programs use it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from client.cli import app
from client.data.picture import Header, Reason
from simulations.phantoms.hospital import write_hospital
from simulations.phantoms.scanners import SCANNERS
from tests.client.data.handmade import patients, picture, write_site

Command = list[str | Path]
STUDY = '[study]\nid = "small"\n[model]\nimage-size = 16\n'


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr; messages in one line, however wide the terminal is."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, labels, a study, and an indexed site; tests work on copies of the site."""
    folder = tmp_path_factory.mktemp("hospital")
    write_hospital(folder, scanner=SCANNERS[0], lesions=("disc", "ring"), patients_per_lesion=4, seed=0, size=32)
    (folder / "dicom" / "SECRET.txt").write_text("not an image")
    (folder / "small.toml").write_text(STUDY)
    code, out, err = run(*index_again(folder, folder / "site"), "--study", folder / "small.toml", "--test", "0.4")
    assert code == 0, err
    (folder / "first.json").write_text(out)
    (folder / "first.err").write_text(err)
    return folder


@pytest.fixture
def site(hospital: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hospital / "site", tmp_path / "site"))


def index_again(hospital: Path, site: Path) -> Command:
    command: Command = ["index", hospital / "dicom", "--labels", hospital / "labels.csv", "--site", site]
    return [*command, "--workers", "1", "--json"]


def images(hospital: Path) -> int:
    return len(list(hospital.glob("dicom/**/*.dcm")))


@pytest.mark.parametrize("command", ["index", "stats", "verify", "evict", "adapt", "predict", "worklist", "thetas"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: wardround-site {command}" in out


def test_a_crash_does_not_print_local_variables() -> None:
    assert not app.pretty_exceptions_show_locals


def test_indexing_prints_json_for_a_program_and_progress_for_people(hospital: Path) -> None:
    report = json.loads((hospital / "first.json").read_text())
    count = images(hospital)
    assert report["run"] == {
        "read": count, "unchanged": 0, "refused": 1, "gone": 0, "links_not_followed": 0, "leaks": 0,
    }  # fmt: skip
    assert report["refused"] == {Reason.NOT_AN_IMAGE.value: 1}
    assert report["pictures"] == count
    assert report["prepared"] == 1
    assert "indexing" in (hospital / "first.err").read_text()


def test_a_second_run_reads_nothing_and_needs_no_option_of_the_first(hospital: Path, site: Path) -> None:
    code, out, err = run(*index_again(hospital, site))
    assert code == 0, err
    report = json.loads(out)
    assert report["run"]["read"] == 0
    assert report["run"]["unchanged"] == images(hospital) + 1
    assert report["pictures"] == images(hospital)


def test_what_the_first_run_fixed_cannot_be_changed(hospital: Path, site: Path) -> None:
    code, out, err = run(*index_again(hospital, site), "--test", "0.3")
    assert (code, out) == (1, "")
    assert "made with test = 0.4, not 0.3" in err


def test_indexing_tells_people_what_happened(hospital: Path, site: Path) -> None:
    code, out, _ = run(*index_again(hospital, site)[:-1])
    assert code == 0
    assert f"0 files read, {images(hospital) + 1} unchanged" in out
    assert Reason.NOT_AN_IMAGE.value in out
    assert f"{images(hospital)} pictures are ready for episodes" in out
    assert "SECRET" not in out


def test_stats_for_a_program_and_for_people(site: Path) -> None:
    code, out, err = run("stats", "--site", site, "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert set(figures["classes"]) == {"disc", "ring"}
    assert figures["scanners"] == {"Phantom Imaging Axis 64": figures["pictures"]}
    code, out, _ = run("stats", "--site", site)
    assert code == 0
    for word in ("disc", "ring", "CT", "Phantom Imaging Axis 64", "largest K"):
        assert word in out


def test_stats_writes_a_page_with_thumbnails(site: Path, tmp_path: Path) -> None:
    code, _, err = run("stats", "--site", site, "--page", tmp_path / "page.html")
    assert code == 0, err
    assert "data:image/png;base64," in (tmp_path / "page.html").read_text()
    code, _, err = run("stats", "--site", site, "--page", tmp_path / "nowhere" / "page.html")
    assert code == 1
    assert "error: the page cannot be written there" in err


def test_few_patients_get_a_clear_statement(tmp_path: Path) -> None:
    pictures = [picture(who, label) for label, number in (("a", 5), ("b", 1)) for who in patients("train", number)]
    code, out, _ = run("stats", "--site", write_site(tmp_path / "site", pictures))
    said = " ".join(out.split())
    assert code == 0
    assert "No training episode can be drawn: that takes two classes with two training patients each." in said
    assert "in no training episode: b (1)." in said


def test_what_stands_in_files_is_not_markup(tmp_path: Path) -> None:
    odd = Header("CT", "[/red]", "[bold]:smile:")
    site = write_site(tmp_path / "site", [picture(who, "[/]", odd) for who in patients("train", 2)])
    code, out, _ = run("stats", "--site", site)
    assert code == 0
    assert "[/red] [bold]:smile:" in out
    assert "[/] " in out


@pytest.mark.parametrize("command", ["stats", "verify", "evict"])
@pytest.mark.parametrize("made", [False, True])
def test_without_a_catalogue_there_is_a_clear_message(tmp_path: Path, command: str, made: bool) -> None:
    site = tmp_path / "site"
    if made:
        site.mkdir()
    code, out, err = run(command, "--site", site)
    assert (code, out) == (1, "")
    assert "no catalogue" in err
    assert "run `wardround-site index` first" in err
    assert list(tmp_path.glob("site/*")) == []  # and none was made by asking


def test_a_flipped_byte_is_found(site: Path) -> None:
    code, out, _ = run("verify", "--site", site, "--json")
    assert code == 0
    checked = json.loads(out)
    assert checked["checked"] > 0
    (pixels,) = site.glob("cache/*/pixels.raw")
    data = bytearray(pixels.read_bytes())
    data[300] ^= 1
    pixels.write_bytes(data)
    code, out, err = run("verify", "--site", site, "--json")
    assert code == 1
    assert json.loads(out) == {**checked, "damaged": 1}
    assert "run `wardround-site evict`, then `wardround-site index` with --study" in err
    assert "damaged: 1" in run("verify", "--site", site)[1]


def test_what_was_evicted_comes_back_byte_for_byte(hospital: Path, site: Path) -> None:
    (pixels,) = site.glob("cache/*/pixels.raw")
    before = pixels.read_bytes()
    other = hospital / "other.toml"
    other.write_text(STUDY.replace("16", "24"))
    assert "deleted: 0" in run("evict", "--site", site, "--study", other)[1]
    assert pixels.exists()
    assert "deleted: 1" in run("evict", "--site", site, "--study", hospital / "small.toml")[1]
    assert not pixels.exists()
    assert json.loads(run("verify", "--site", site, "--json")[1]) == {"checked": 0, "damaged": 0}
    assert "No pixels are prepared yet" in run(*index_again(hospital, site)[:-1])[1]
    code, out, err = run(*index_again(hospital, site), "--study", hospital / "small.toml")
    assert code == 0, err
    assert json.loads(out)["run"]["read"] == images(hospital)
    assert pixels.read_bytes() == before


def test_the_list_of_refused_files_is_for_its_owner(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "SECRET.txt").write_text("not an image")
    refused = tmp_path / "refused.txt"
    refused.write_text("old")
    refused.chmod(0o644)
    command: Command = ["index", tmp_path / "files", "--site", tmp_path / "site", "--workers", "1", "--refused-list"]
    code, out, err = run(*command, refused)
    assert code == 0, err
    assert refused.read_text() == f"{Reason.NOT_AN_IMAGE.value}\t{tmp_path / 'files' / 'SECRET.txt'}\n"
    assert refused.stat().st_mode & 0o777 == 0o600
    assert "SECRET" not in out + err
    code, _, err = run(*command, tmp_path / "nowhere" / "refused.txt")
    assert code == 1
    assert "error: the list of refused files cannot be written there" in err


def test_a_leak_fails_loudly_until_the_shared_pictures_are_left_out(tmp_path: Path) -> None:
    shades = np.arange(200, dtype=np.uint8)
    shades[::4] = 200  # every second patient has this picture too: all of them on one side would be a wonder
    groups = [str(k // 2) for k in range(200)]
    stack = np.broadcast_to(shades[:, None, None], (200, 16, 16))
    np.savez(tmp_path / "set.npz", images=stack, labels=np.zeros(200, int), groups=groups, label_names=["a"])
    command: Command = ["index", tmp_path / "set.npz", "--site", tmp_path / "site", "--workers", "1", "--json"]
    code, out, err = run(*command)
    assert code == 1
    assert json.loads(out)["run"]["leaks"] > 0
    assert "--leave-out-shared" in err
    assert run("stats", "--site", tmp_path / "site")[1].count("The split leaks") == 1
    code, out, err = run(*command, "--leave-out-shared")
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    assert report["run"]["leaks"] == 0
    assert report["aside"] == {"same picture of two patients": 50}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such study file"),
        (b"\xff\xfe", "not text in UTF-8"),
        (b"[study]\nround = 3\n", "unknown key"),
    ],
)
def test_a_bad_study_file_has_its_own_exit_code(tmp_path: Path, content: bytes | None, says: str) -> None:
    study = tmp_path / "bad.toml"
    if content is not None:
        study.write_bytes(content)
    code, out, err = run("index", tmp_path, "--site", tmp_path / "site", "--study", study)
    assert (code, out) == (2, "")
    assert says in err
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--frames", "some"], "--frames is all, middle or a number"),
        (["--validation", "0.5", "--test", "0.5"], "their sum must be below 1"),
        (["--map", "label"], "--map takes COLUMN=NAME"),
        (["--map", "a=label"], "--map is about the labels file: add --labels"),
        (["--labels", "nowhere.csv"], "the labels file cannot be opened"),
    ],
)
def test_a_bad_option_is_explained(tmp_path: Path, options: list[str], says: str) -> None:
    (tmp_path / "files").mkdir()
    code, out, err = run("index", tmp_path / "files", "--site", tmp_path / "site", *options)
    assert (code, out) == (1, "")
    assert says in err
    assert not (tmp_path / "site").exists()  # it is said before anything is read


def test_a_folder_that_is_not_there_is_explained(tmp_path: Path) -> None:
    code, _, err = run("index", tmp_path / "SECRET", "--site", tmp_path / "site")
    assert code == 1
    assert "a folder to index does not exist" in err
    assert "SECRET" not in err

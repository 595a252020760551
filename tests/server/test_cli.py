"""`wardround-study` as people and programs use it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.study import Study
from server.cli import app

STUDIES = sorted((Path(__file__).parents[2] / "simulations" / "studies").glob("*.toml"))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.stem)
def test_shipped_studies_are_valid_and_named_like_their_file(file: Path) -> None:
    code, output = run("check", str(file), "--json")
    assert code == 0, output
    answer = json.loads(output)
    assert answer["study"]["study.id"] == file.stem
    assert answer["digest"] == Study.from_toml(file.read_text()).digest


def test_check_says_in_words_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text("[study]\nrounds = 'many'\n[outer]\nlearning-rate = 0.1\n")
    code, output = run("check", str(file))
    assert code == 2
    assert "study.rounds" in output
    assert "'many'" in output
    assert "outer.learning-rate: unknown key" in output
    assert "rate" in output


@pytest.mark.parametrize("content", [b"[study", b"\xff\xfe", b"id = 3"])
def test_check_refuses_what_is_no_study_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "study.toml"
    file.write_bytes(content)
    code, output = run("check", str(file))
    assert code == 2
    assert "Traceback" not in output


def test_check_of_a_missing_file() -> None:
    code, output = run("check", "no-such-file.toml")
    assert code == 2
    assert "no-such-file.toml cannot be read" in output


def test_sign_and_verify(tmp_path: Path) -> None:
    file, key = tmp_path / "study.toml", tmp_path / "coordinator"
    file.write_text("[study]\nrounds = 3\n")
    assert run("keygen", str(key))[0] == 0
    assert (tmp_path / "coordinator.key").stat().st_mode & 0o777 == 0o600
    assert run("keygen", str(key))[0] != 0  # never overwrites a key
    assert run("sign", str(file), "--key", f"{key}.key")[0] == 0
    assert run("verify", str(file), "--key", f"{key}.pub")[0] == 0
    file.write_text("[study]\nrounds = 4\n")
    code, output = run("verify", str(file), "--key", f"{key}.pub")
    assert code == 1
    assert "does not verify" in output


@pytest.mark.parametrize("command", ["check", "keygen", "sign", "verify", "export", "resume", "status", "report"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    code, output = run(command, "--help")
    assert code == 0
    assert "Example: wardround-study" in output

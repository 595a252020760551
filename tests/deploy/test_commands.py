"""Every command in units, compose files and manifests, as the program itself reads its options.

Options of Flower's come and go: files that were written for another version of it do not start.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import click
import pytest
import typer

from client.cli import app as site_app
from server.cli import app as study_app
from tests.deploy.shipped import DEPLOY, NODE, UNITS, commands_of, documents, exec_lines

#: Where Flower makes the parser of each of its programs.
PARSERS = {
    "deploy.supernode": "flwr.supernode.cli.flower_supernode:_parse_args_run_supernode",
    "flower-superlink": "flwr.superlink.cli.flower_superlink:_parse_args_run_superlink",
    "flower-superexec": "flwr.supercore.cli.flower_superexec:_parse_args",
}


#: Our own commands.
PROGRAMS: dict[str, Any] = {
    "wardround-site": typer.main.get_command(site_app).commands,  # type: ignore[attr-defined]
    "wardround-study": typer.main.get_command(study_app).commands,  # type: ignore[attr-defined]
}


def shipped() -> dict[str, list[str]]:
    """Return all commands, each under the file and the words that it begins with."""
    found = {}
    for path in UNITS:
        for command in exec_lines(path, "ExecStart"):
            if command[0].startswith("/opt/wardround/bin/"):
                found[path.name] = [command[0].rpartition("/")[2], *command[1:]]
    for path in sorted((DEPLOY / "compose").rglob("*.yaml")) + sorted((DEPLOY / "kubernetes").rglob("*.yaml")):
        for command in commands_of(documents(path.read_text())):
            found[f"{'/'.join(path.parts[-3:])}: {' '.join(command[:2])}"] = command
    return {where: bare(command) for where, command in found.items()}


def bare(command: list[str]) -> list[str]:
    """Return a command without what comes before our own module, where Python is told to run one."""
    return command[len(NODE) - 1 :] if command[1 : len(NODE)] == NODE[1:] else command


COMMANDS = shipped()


def parse(command: list[str]) -> Any:
    if command[0] in PARSERS:
        module, _, name = PARSERS[command[0]].partition(":")
        parser: Callable[[], Any] = getattr(import_module(module), name)
        return parser().parse_args(command[2 if command[0] == "deploy.supernode" else 1 :])
    sub = PROGRAMS[command[0]][command[1]]
    return sub.make_context(command[1], command[2:])


def test_all_of_them_are_found() -> None:
    programs = [command[0] for command in COMMANDS.values()]
    assert {name: programs.count(name) for name in PARSERS} == {
        "deploy.supernode": 3,
        "flower-superlink": 3,
        "flower-superexec": 6,
    }


@pytest.mark.parametrize("where", COMMANDS)
def test_the_program_knows_the_options(where: str) -> None:
    command = COMMANDS[where]
    if command[1] == "gateway" and "gateway" not in PROGRAMS["wardround-site"]:
        pytest.skip("this version has no `wardround-site gateway` yet")
    parse(command)


@pytest.mark.parametrize(
    "command",
    [
        [
            "deploy.supernode",
            "127.0.0.1:9097",
            "--clientappio-api-address",
            "0.0.0.0:9094",
        ],  # as it was in earlier versions of Flower
        ["flower-superlink", "--serverappio-api-address", "0.0.0.0:9091"],
        ["flower-superexec", "--runtime-api-address", "a:1", "--no-such-option"],
        ["wardround-study", "sites", "--no-such-option"],
    ],
)
def test_an_option_that_there_is_not_is_found(command: list[str]) -> None:
    with pytest.raises((SystemExit, click.UsageError)):
        parse(command)


@pytest.mark.parametrize("where", [where for where, command in COMMANDS.items() if command[0] == "deploy.supernode"])
def test_a_supernode_knows_the_gateway_and_runs_no_app_itself(where: str) -> None:
    options = parse(COMMANDS[where])
    # In clear, and so on the loopback only: the gateway has the keys and speaks TLS with the edge.
    assert options.superlink == gateway_address()
    assert COMMANDS[where][1] == gateway_address("--health")
    assert options.superlink.startswith("127.0.0.1:")
    assert options.auth_supernode_private_key is None
    assert options.isolation == "process"
    assert options.superexec_auth_secret_file
    assert not options.runtime_dependency_install


def gateway_address(option: str = "--listen") -> str:
    """Return where all gateways listen, or what else they are told."""
    [address] = {
        command[command.index(option) + 1]
        for command in COMMANDS.values()
        if command[:2] == ["wardround-site", "gateway"]
    }
    return address


@pytest.mark.parametrize("where", [where for where, command in COMMANDS.items() if command[0] == "flower-superlink"])
def test_a_superlink_wants_node_keys_and_tls(where: str) -> None:
    options = parse(COMMANDS[where])
    assert options.enable_supernode_auth
    assert options.ssl_certfile
    assert not options.insecure
    assert options.isolation == "process"
    assert options.superexec_auth_secret_file
    assert options.database.endswith("/state.db")
    assert not options.runtime_dependency_install


@pytest.mark.parametrize("where", [where for where, command in COMMANDS.items() if command[0] != "wardround-study"])
def test_all_but_one_answer_the_health_service(where: str) -> None:
    options = parse(COMMANDS[where])
    if COMMANDS[where][0] == "wardround-site":
        assert options.params.keys() & {"health", "socket"}  # the worker's is at its socket
    elif where != "wardround-executor.service":  # systemd lets it listen nowhere
        assert options.health_server_address


@pytest.mark.parametrize("where", [where for where, command in COMMANDS.items() if command[1] == "worker"])
def test_a_worker_answers_no_study_that_was_not_approved(where: str) -> None:
    assert parse(COMMANDS[where]).params["approvals"] == "/var/lib/wardround/gateway/site"

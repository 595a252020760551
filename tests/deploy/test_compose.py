"""The compose files, as Compose itself reads them, and what they promise about who reaches what."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.shipped import DEPLOY, load, probe, run

COMPOSE = DEPLOY / "compose"
#: The service of each side whose network leads out.
DOORS = {"site": "net", "coordinator": "edge"}

side = pytest.mark.parametrize("side", DOORS)


def services(side: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = load(COMPOSE / side / "compose.yaml")["services"]
    return found


def compose() -> list[str]:
    """Return the command of Compose that there is: Docker's plugin, or the older program."""
    if shutil.which("docker") and run(["docker", "compose", "version"]).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither `docker compose` nor docker-compose is installed: only the files' content was checked")


def config(*files: Path) -> tuple[int, str]:
    command = compose() + [word for file in files for word in ("--file", str(file))] + ["config", "--quiet"]
    done = run(command, env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]})
    return done.returncode, done.stdout


@pytest.mark.parametrize("files", [["site/compose.yaml"], ["site/compose.yaml", "site/nvidia.yaml"]])
def test_compose_takes_the_site_s_files(files: list[str]) -> None:
    assert config(*(COMPOSE / file for file in files)) == (0, "")


def test_compose_takes_the_coordinator_s_file() -> None:
    assert config(COMPOSE / "coordinator" / "compose.yaml") == (0, "")


def test_compose_finds_a_mistake(tmp_path: Path) -> None:
    text = (COMPOSE / "coordinator" / "compose.yaml").read_text()
    for old, new in (("read_only", "readonly"), ("restart: always", "restart: 5")):
        assert old in text
        (tmp_path / "compose.yaml").write_text(text.replace(old, new))
        assert config(tmp_path / "compose.yaml")[0] != 0


@side
def test_every_container_is_shut_in(side: str) -> None:
    for name, service in services(side).items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["user"].partition(":")[0]) >= 1000
        assert service["restart"] == ("no" if service.get("profiles") else "always")
        assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & set(service)
        assert not any("docker.sock" in volume for volume in service.get("volumes", []))


@side
def test_every_network_and_secret_is_declared_and_used(side: str) -> None:
    whole = load(COMPOSE / side / "compose.yaml")
    for kind in ("networks", "secrets"):
        assert {name for one in whole["services"].values() for name in one.get(kind, [])} == set(whole[kind])


def networks(side: str, name: str) -> set[str]:
    """Return the networks that a service is in, its own or those of the one whose it shares."""
    service = services(side)[name]
    shared = service.get("network_mode", "").removeprefix("service:")
    if shared == "none":
        return set()
    return networks(side, shared) if shared else set(service["networks"])


@side
def test_only_the_door_is_in_a_network_that_leads_out(side: str) -> None:
    declared = load(COMPOSE / side / "compose.yaml")["networks"]
    out = {name for name, network in declared.items() if not network.get("internal")}
    doors = {"net", "gateway", "supernode"} if side == "site" else {"edge"}
    assert {name for name in services(side) if out & networks(side, name)} == doors
    ports = {name for name, service in services(side).items() if service.get("ports")}
    assert ports == ({"edge"} if side == "coordinator" else set())


def test_the_clientapp_shares_a_network_with_the_supernode_alone() -> None:
    [network] = networks("site", "executor")
    assert {name for name in services("site") if network in networks("site", name)} == {
        *("executor", "supernode"),
        *("net", "gateway"),  # in the SuperNode's network; the gateway listens on its loopback only
    }


def test_the_gateway_answers_the_supernode_s_user_alone() -> None:
    supernode, gateway = services("site")["supernode"], services("site")["gateway"]
    assert gateway["command"][-2:] == ["--node-user", supernode["user"].partition(":")[0]]


def test_no_container_of_a_site_sees_another_s_folder() -> None:
    folders = {name: [v.partition(":")[0] for v in one.get("volumes", [])] for name, one in services("site").items()}
    assert folders.pop("gateway") == ["/var/lib/wardround/gateway"]
    approvals = "/var/lib/wardround/gateway/site/gateway/approvals"
    assert folders.pop("worker") == ["/var/lib/wardround/app", "/var/lib/wardround/socket", approvals]
    assert folders.pop("executor") == ["/var/lib/wardround/socket"]
    assert not any(folders.values())
    users = {one["user"].partition(":")[0] for name, one in services("site").items() if name != "net"}
    assert len(users) == 4


def test_the_clientapp_asks_the_worker_at_one_socket() -> None:
    site = services("site")
    socket = option(site["worker"], "--socket")
    assert f'--node-config=worker="{socket}"' in site["supernode"]["command"]
    folder = socket.rpartition("/")[0]
    assert f"/var/lib/wardround/socket:{folder}" in site["worker"]["volumes"]
    assert site["executor"]["volumes"] == [f"/var/lib/wardround/socket:{folder}:ro"]
    assert networks("site", "worker") == set()
    # As the file says how to make it: the worker's, for the executor's group.
    worker, (_, group) = site["worker"]["user"].partition(":")[0], site["executor"]["user"].split(":")
    made = f"install -d -m 2750 -o {worker} -g {group} /var/lib/wardround/socket"
    assert made in (COMPOSE / "site" / "compose.yaml").read_text()
    assert set(load(COMPOSE / "site" / "nvidia.yaml")["services"]) == {"worker"}


def test_the_worker_reads_what_the_site_has_approved_and_nothing_else_of_the_gateway() -> None:
    gateway, worker = services("site")["gateway"], services("site")["worker"]
    site = option(worker, "--approvals")
    assert site == f"{gateway['environment']['WARDROUND_HOME']}/site"
    assert [volume for volume in worker["volumes"] if "gateway" in volume] == [
        f"{site}/gateway/approvals:{site}/gateway/approvals:ro"
    ]
    # As the file says how to make it, before Docker would: the gateway's, for the worker's group to read.
    owner, (_, group) = gateway["user"].partition(":")[0], worker["user"].split(":")
    text = (COMPOSE / "site" / "compose.yaml").read_text()
    assert f"install -d -m 0750 -o {owner} -g {group} {site}/gateway/approvals\n" in text
    assert f"install -d -m 0700 -o {owner} {site} {site}/gateway\n" in text


def option(service: dict[str, Any], name: str) -> str:
    """Return the value of an option, which is the next word or follows ``=``."""
    [value] = re.findall(rf" {name}[ =](\S+)", " ".join(service["command"]))
    return str(value)


@side
def test_every_process_is_asked_for_its_health(side: str) -> None:
    options = {"gateway": "--health", "worker": "--socket", "edge": "", "net": "", "study": ""}
    for name, service in services(side).items():
        if where := options.get(name, "--health-server-address"):
            address = option(service, where)
            assert address[0] == "/" or address.startswith("127.0.0.1:")
            asked = probe(f"unix:{address}" if address[0] == "/" else address)
            assert service["healthcheck"]["test"] == ["CMD", *asked]
        else:
            assert "healthcheck" not in service


def test_the_images_are_pinned_and_built_from_the_lock() -> None:
    version = re.search(r'^version = "(.+)"$', (DEPLOY.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    images = {service["image"] for side in DOORS for service in services(side).values()}
    assert images == {f"wardround:{version[1]}", f"wardround-edge:{version[1]}"}
    dockerfile = (DEPLOY / "image" / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert bases
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])
    assert "RUN make /opt/wardround VENV=/opt/wardround" in dockerfile
    copied = {
        line[1:] for line in (DEPLOY / "image" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    needed = {"Makefile", "pyproject.toml", "requirements", "README.md", "LICENSE"}
    assert copied == needed | {"common", "client", "server", "deploy", "simulations"}
    assert all((DEPLOY.parent / name).exists() for name in copied)

"""The units, as systemd itself judges them, and what they promise about who reaches what."""

import shutil
import subprocess
from pathlib import Path

import pytest

from common.environment import QUIET
from tests.deploy.shipped import DEPLOY, UNITS, exec_lines, run, settings, tool

SITE, COORDINATOR = DEPLOY / "systemd" / "site", DEPLOY / "systemd" / "coordinator"
BOUND = 3.0

unit = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with the units and their drop-ins, and an empty program for every command in them."""
    units = tmp_path / "etc" / "systemd" / "system"
    for folder in (SITE, COORDINATOR):
        shutil.copytree(folder, units, dirs_exist_ok=True)
    for name in ("sysinit", "basic", "shutdown", "multi-user", "network-online"):
        target = tmp_path / "usr" / "lib" / "systemd" / "system" / f"{name}.target"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("[Unit]\nDefaultDependencies=no\n")
    for path in UNITS:
        for command in exec_lines(path):
            program = tmp_path / command[0].lstrip("/")
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
    return tmp_path


def verify(root: Path, name: str) -> str:
    """Return what systemd finds wrong with a unit; it answers 0 for keys that it does not know."""
    done = run([tool("systemd-analyze"), "verify", f"--root={root}", "--man=no", "--recursive-errors=yes", name])
    return done.stdout + (f"exit code {done.returncode}" if done.returncode else "")


def exposure(root: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Have systemd judge a unit; exit code 1 above the bound."""
    bound = f"--threshold={round(BOUND * 10)}"
    return run([tool("systemd-analyze"), "security", "--offline=true", f"--root={root}", "--no-pager", bound, name])


@unit
def test_systemd_finds_nothing_wrong(unit: Path, root: Path) -> None:
    assert verify(root, unit.name) == ""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("RestartSec=", "RestartSek=", "Unknown key"),
        ("Restart=always", "Restart=ever", "Failed to parse"),
        ("/opt/wardround/bin/python -I -m deploy.s", "/opt/wardround/bin/pypython -I -m deploy.s", "not executable"),
        ("After=wardround-gateway.service", "Requires=wardround-gatway.service", "not found"),
    ],
)
def test_systemd_finds_a_mistake(old: str, new: str, says: str, root: Path) -> None:
    file = root / "etc" / "systemd" / "system" / "wardround-supernode.service"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert says in verify(root, file.name)


@unit
def test_exposure_is_within_the_bound(unit: Path, root: Path) -> None:
    done = exposure(root, unit.name)
    assert done.returncode == 0, done.stdout


def test_a_unit_without_its_walls_is_beyond_the_bound(root: Path) -> None:
    file = root / "etc" / "systemd" / "system" / "wardround-executor.service"
    walls = ("Private", "Protect", "Restrict", "System", "Capability", "IPAddress", "NoNew", "User")
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith(walls)))
    assert exposure(root, file.name).returncode == 1


@unit
def test_a_process_that_ends_is_started_again_and_not_at_once(unit: Path) -> None:
    found = settings(unit)
    assert found["Restart"] == ["always"]
    # A message waits 20 s for the worker; Flower minds only a SuperNode that comes back soon.
    assert found["RestartSec"] == ["2" if unit.stem == "wardround-worker" else "15"]
    assert found["StartLimitIntervalSec"] == ["0"]


@unit
def test_nothing_calls_home(unit: Path) -> None:
    if exec_lines(unit, "ExecStart")[0][0].startswith("/opt/wardround"):
        words = " ".join(settings(unit)["Environment"]).split()
        assert {f"{name}={value}" for name, value in QUIET.items() if name.startswith("FLWR")} <= set(words)


@pytest.mark.parametrize("folder", [SITE, COORDINATOR], ids=lambda path: path.name)
def test_every_process_has_a_user_and_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    users = {settings(path)["User"][0] for path in folder.glob("*.service")}
    assert len(users) == len(list(folder.glob("*.service")))
    (tmp_path / "etc").mkdir()
    run([tool("systemd-sysusers"), f"--root={tmp_path}", folder / "sysusers.conf"])
    made = {line.split(":")[0]: line for line in (tmp_path / "etc" / "passwd").read_text().splitlines()}
    assert {name for name in made if name.startswith("wardround")} == users
    assert all(made[name].endswith("nologin") for name in users)
    lines = (folder / "tmpfiles.conf").read_text().splitlines()
    folders = {words[1]: words[2:5] for line in lines if (words := line.split())[0] == "d"}
    for name in users:
        assert folders[made[name].split(":")[5]] == ["0700", name, name]


def option(unit: Path, name: str) -> str:
    [command] = exec_lines(unit, "ExecStart")
    return command[command.index(name) + 1]


def test_only_the_gateway_may_reach_out_of_a_site() -> None:
    for path in SITE.glob("*.service"):
        found = settings(path)
        assert found["IPAddressDeny"] == ["any"]
        if path.stem == "wardround-worker":
            assert found["PrivateNetwork"] == ["yes"]
            assert "IPAddressAllow" not in found
        elif path.stem != "wardround-gateway":
            assert found["RestrictNetworkInterfaces"] == ["lo"]
            assert all(value == "localhost" or value.startswith("127.") for value in found["IPAddressAllow"])
    assert [path.parent.name for path in SITE.glob("*.d/*") if "IPAddressAllow" in path.read_text()] == [
        "wardround-gateway.service.d"
    ]


def test_the_gateway_answers_the_supernode_s_user_alone_and_can_see_who_asks() -> None:
    gateway = SITE / "wardround-gateway.service"
    assert [option(gateway, "--node-user")] == settings(SITE / "wardround-supernode.service")["User"]
    # /proc/net/tcp, with the users' own numbers.
    assert not {"PrivateUsers", "ProcSubset"} & set(settings(gateway))


def test_the_clientapp_reaches_the_supernode_and_nothing_else_of_this_machine() -> None:
    executor, supernode = settings(SITE / "wardround-executor.service"), SITE / "wardround-supernode.service"
    host, port = option(supernode, "--host"), option(supernode, "--port")
    assert executor["IPAddressAllow"] == [host]
    assert "LoadCredential=node.key" not in supernode.read_text(), "the keys are the gateway's"
    assert option(SITE / "wardround-executor.service", "--runtime-api-address") == f"{host}:{port}"
    assert option(supernode, "--superlink").partition(":")[0] != host
    # AF_UNIX is for the worker's socket. Those of others lie in /run, and of /run it sees that one folder.
    assert executor["RestrictAddressFamilies"] == ["AF_INET AF_UNIX"]
    assert executor["BindReadOnlyPaths"] == ["/run/wardround/worker"]
    assert executor["SocketBindDeny"] == ["any"]
    assert "SocketBindAllow" not in executor
    assert executor["PrivateTmp"] == ["yes"]
    assert executor["TemporaryFileSystem"] == ["/run:ro", "/dev/shm:mode=1777"]


def test_the_clientapp_sees_no_image_and_asks_the_worker_at_one_socket() -> None:
    executor, worker = (SITE / f"wardround-{name}.service" for name in ("executor", "worker"))
    socket = Path(option(worker, "--socket"))
    assert option(SITE / "wardround-supernode.service", "--node-config") == f'worker="{socket}"'
    assert settings(worker)["ReadWritePaths"] == settings(executor)["BindReadOnlyPaths"] == [str(socket.parent)]
    assert settings(worker)["RestrictAddressFamilies"] == ["AF_UNIX"]
    lines = [line.split() for line in (SITE / "tmpfiles.conf").read_text().splitlines() if line.startswith("d ")]
    folders = {path: (mode, user, group) for _, path, mode, user, group, _ in lines}
    # The worker's own, for the executor's group, and for nobody else: as the worker demands.
    owner, guest = settings(worker)["User"][0], settings(executor)["Group"][0]
    assert folders[str(socket.parent)] == ("2750", owner, guest)
    [state] = settings(worker)["StateDirectory"]
    assert settings(worker)["BindPaths"] == [f"/var/lib/{state}"] == ["/var/lib/wardround/app"]
    assert folders["/var/lib/wardround/app"] == ("0700", owner, owner)
    assert owner != settings(executor)["User"][0]
    assert "/app" not in executor.read_text()
    assert [path.parent.name for path in SITE.glob("*.d/nvidia.conf")] == ["wardround-worker.service.d"]


def test_the_worker_reads_what_the_site_has_approved_and_nothing_else_of_the_gateway() -> None:
    worker, gateway = SITE / "wardround-worker.service", SITE / "wardround-gateway.service"
    site = option(worker, "--approvals")
    assert f"WARDROUND_HOME={Path(site).parent}" in settings(gateway)["Environment"]
    approvals = Path(site) / "gateway" / "approvals"
    assert settings(worker)["BindReadOnlyPaths"] == [str(approvals)]
    assert "/var/lib/wardround:ro" in settings(worker)["TemporaryFileSystem"]
    lines = [line.split() for line in (SITE / "tmpfiles.conf").read_text().splitlines() if line.startswith("d ")]
    folders = {path: (mode, user, group) for _, path, mode, user, group, _ in lines}
    # It is there before the worker starts. Its owner alone writes, and nobody else comes in from above.
    owner, guest = settings(gateway)["User"][0], settings(worker)["Group"][0]
    assert folders[str(approvals)] == ("0750", owner, guest)
    for parent in (Path(site), Path(site) / "gateway"):
        assert folders[str(parent)] == ("0700", owner, owner)


#: The option of each process that says where it is to be asked for its health. nginx and the executor of the ClientApp,
#: which listens nowhere, are not asked: systemd sees that they live.
HEALTH = {
    "wardround-gateway": "--health",
    "wardround-worker": "--socket",
    "wardround-supernode": "--health-server-address",
    "wardround-superlink": "--health-server-address",
    "wardround-serverapp": "--health-server-address",
}


@unit
def test_a_unit_has_started_when_its_process_is_serving(unit: Path) -> None:
    if unit.stem not in HEALTH:
        assert "ExecStartPost" not in settings(unit)
        return
    address = option(unit, HEALTH[unit.stem])
    [asked] = exec_lines(unit, "ExecStartPost")
    assert asked[:6] == ["/opt/wardround/bin/python", "-I", "-m", "deploy.health", "--wait", "$MAINPID"]
    assert asked[6:] == [f"unix:{address}" if address.startswith("/") else address]
    if not address.startswith("/"):
        assert address.startswith("127.0.0.")
        # Of either family: gRPC listens with a socket of IPv6, also at an address of IPv4.
        assert f"tcp:{address.rpartition(':')[2]}" in settings(unit)["SocketBindAllow"]


def test_the_edge_sees_nothing_of_the_authority_s_keys() -> None:
    edge = settings(COORDINATOR / "wardround-edge.service")
    [command, *_] = edge["ExecStart"]
    assert edge["TemporaryFileSystem"] == ["/var/lib/wardround:ro"]
    assert command.split("-c ")[1].split()[0].rpartition("/")[0] == edge["BindPaths"][0]
    assert "authority.key" not in command


def test_the_superlink_is_on_this_machine_alone() -> None:
    unit = COORDINATOR / "wardround-superlink.service"
    assert option(unit, "--host") == "127.0.0.1"
    assert settings(unit)["IPAddressAllow"] == ["localhost"]
    assert "--enable-supernode-auth" in exec_lines(unit, "ExecStart")[0]

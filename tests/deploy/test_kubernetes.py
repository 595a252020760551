"""The manifests, as kustomize renders them, against Kubernetes' own schemas and what they promise."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.shipped import DEPLOY, documents, probe, run, tool

KUBERNETES = DEPLOY / "kubernetes"
VERSION = "1.32"

Thing = dict[str, Any]

overlay = pytest.mark.parametrize("overlay", ["site", "coordinator"])


@functools.cache
def render(folder: Path) -> tuple[Thing, ...]:
    done = run([tool("kubectl"), "kustomize", str(folder)])
    assert done.returncode == 0, done.stdout
    return tuple(documents(done.stdout))


def of(overlay: str, kind: str) -> dict[str, Thing]:
    return {thing["metadata"]["name"]: thing for thing in render(KUBERNETES / overlay) if thing["kind"] == kind}


def pods(overlay: str) -> dict[str, Thing]:
    return {name: thing["spec"]["template"]["spec"] for name, thing in of(overlay, "Deployment").items()}


def containers(overlay: str) -> list[Thing]:
    return [one for pod in pods(overlay).values() for one in [*pod.get("initContainers", []), *pod["containers"]]]


@overlay
def test_the_schemas_of_kubernetes_allow_it(overlay: str) -> None:
    reason = "kubernetes-validate is not installed: the manifests were rendered and not held against the schemas"
    validate = pytest.importorskip("kubernetes_validate", reason=reason)
    for thing in render(KUBERNETES / overlay):
        validate.validate(thing, VERSION, strict=True)
    broken = dict(render(KUBERNETES / overlay)[-1], spek={})
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, VERSION, strict=True)


@overlay
def test_every_pod_meets_the_restricted_standard(overlay: str) -> None:
    [namespace] = of(overlay, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods(overlay).values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsUser"] >= 1000
        # Keys in a volume that is there already keep their mode.
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all({"persistentVolumeClaim", "secret", "emptyDir"} & set(volume) for volume in pod["volumes"])
    for container in containers(overlay):
        context = dict(container["securityContext"])
        assert context.pop("runAsUser", 1000) >= 1000
        context.pop("runAsGroup", None)
        assert context == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }


@overlay
def test_every_container_is_pinned_bounded_and_watched(overlay: str) -> None:
    for container in containers(overlay):
        assert container["image"].rpartition(":")[2] == "0.1.0"
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    for pod in pods(overlay).values():
        assert all("livenessProbe" in container for container in pod["containers"])


@overlay
def test_secrets_are_named_and_not_in_the_files(overlay: str) -> None:
    assert not of(overlay, "Secret")
    text = "".join(path.read_text() for path in KUBERNETES.rglob("*.yaml"))
    assert "PRIVATE KEY" not in text
    for pod in pods(overlay).values():
        for volume in pod["volumes"]:
            assert volume.get("secret", {"defaultMode": 0o440})["defaultMode"] == 0o440


@overlay
def test_claims_services_and_mounts_fit_together(overlay: str) -> None:
    claimed = []
    for pod in pods(overlay).values():
        names = {volume["name"] for volume in pod["volumes"]}
        claimed += [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        for one in [*pod.get("initContainers", []), *pod["containers"]]:
            assert {mount["name"] for mount in one["volumeMounts"]} <= names
    for name, claim in of(overlay, "PersistentVolumeClaim").items():
        # Every one belongs to one pod, but for what the gateway writes and the worker reads, on one machine.
        mode, pods_of = ("ReadWriteOnce", 2) if name == "approvals" else ("ReadWriteOncePod", 1)
        assert (claim["spec"]["accessModes"], claimed.count(name)) == ([mode], pods_of)
        claimed = [one for one in claimed if one != name]
    assert not claimed
    for service in of(overlay, "Service").values():
        [label] = service["spec"]["selector"].values()
        ports = {port["name"] for one in pods(overlay)[label]["containers"] for port in one.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def allowed(overlay: str, name: str) -> set[str]:
    """Return where a pod may connect to, from all policies that select it."""
    found, selected = set(), False
    for policy in of(overlay, "NetworkPolicy").values():
        spec = policy["spec"]
        wanted = spec["podSelector"].get("matchLabels", {})
        if wanted.items() <= {"app.kubernetes.io/name": name}.items():
            assert spec["policyTypes"] == ["Ingress", "Egress"]
            selected = True
            for rule in spec.get("egress", []):
                assert rule["ports"], "a rule without ports allows all of them"
                ports = ",".join(sorted({str(port["port"]) for port in rule["ports"]}))
                found |= {f"{where(to)}:{ports}" for to in rule["to"]}
    assert selected
    return found


def where(to: Thing) -> str:
    if "ipBlock" in to:
        return str(to["ipBlock"]["cidr"])
    labels = to["podSelector"]["matchLabels"]
    return str(labels.get("app.kubernetes.io/name") or labels["k8s-app"])


def test_out_of_a_site_leads_one_way() -> None:
    assert allowed("site", "gateway") == {"192.0.2.10/32:8443", "kube-dns:53"}
    assert allowed("site", "executor") == {"gateway:9094"}, "no DNS: a name that is looked up is a message"
    assert allowed("site", "somebody else") == set()


def test_the_clientapp_reaches_the_runtime_api_and_not_the_gateway() -> None:
    gateway, supernode = pods("site")["gateway"]["containers"]
    user = str(supernode["securityContext"]["runAsUser"])
    assert gateway["args"][2:] == ["--listen", "127.0.0.1:9095", "--health", "127.0.0.1:9097", "--node-user", user]
    assert "ports" not in gateway
    assert {"name": "runtime", "containerPort": 9094} in supernode["ports"]
    [rule] = of("site", "NetworkPolicy")["gateway"]["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [9094]
    mounts = {mount["name"] for mount in supernode["volumeMounts"]}
    assert "gateway" not in mounts, "the keys are the gateway's"


def test_the_clientapp_sees_no_image_and_asks_the_worker_at_one_socket() -> None:
    pod, node = pods("site")["executor"], pods("site")["gateway"]["containers"][1]
    worker, executor = pod["containers"]
    assert (worker["name"], executor["name"]) == ("worker", "executor")
    [socket] = [word.partition("=")[2] for word in worker["args"] if word.startswith("--socket=")]
    assert f'--node-config=worker="{socket}"' in node["args"]
    assert worker["livenessProbe"]["exec"]["command"] == probe(f"unix:{socket}")
    assert pod["initContainers"][0]["args"][-2:] == ["2750", socket.rpartition("/")[0]]
    assert {mount["name"] for mount in worker["volumeMounts"]} == {"app", "approvals", "socket", "tmp"}
    assert {mount["name"] for mount in executor["volumeMounts"]} == {"socket", "secrets", "tmp-executor"}
    assert {"name": "socket", "mountPath": "/run/wardround", "readOnly": True} in executor["volumeMounts"]
    # Two users; what they have in common is the group of the socket's folder.
    assert executor["securityContext"]["runAsUser"] != pod["securityContext"]["runAsUser"]
    assert executor["securityContext"]["runAsGroup"] != pod["securityContext"]["fsGroup"]
    assert pod["securityContext"]["runAsGroup"] != pod["securityContext"]["fsGroup"]


def test_the_worker_reads_what_the_site_has_approved_and_nothing_else_of_the_gateway() -> None:
    gateway, executor = pods("site")["gateway"], pods("site")["executor"]
    worker = executor["containers"][0]
    [site] = [word.partition("=")[2] for word in worker["args"] if word.startswith("--approvals=")]
    folder = f"{site}/gateway/approvals"
    [home] = [one["value"] for one in gateway["containers"][0]["env"] if one["name"] == "WARDROUND_HOME"]
    assert site == f"{home}/site"
    assert {"name": "approvals", "mountPath": folder, "readOnly": True} in worker["volumeMounts"]
    # Not only its mount: or the kubelet would give the files to this pod's group, and take them from the gateway.
    [volume] = [one for one in executor["volumes"] if one["name"] == "approvals"]
    assert volume["persistentVolumeClaim"] == {"claimName": "approvals", "readOnly": True}
    first, join = gateway["initContainers"]
    assert first["args"] == ["mkdir", "-p", folder]
    assert [mount["name"] for mount in first["volumeMounts"]] == ["gateway"]
    for one in (join, gateway["containers"][0]):
        assert {"name": "approvals", "mountPath": folder} in one["volumeMounts"]
    shown = {one["name"] for one in containers("site") for mount in one["volumeMounts"] if mount["name"] == "approvals"}
    assert shown == {"join", "gateway", "worker"}


@overlay
def test_probes_ask_the_health_service(overlay: str) -> None:
    for name, one in {one["name"]: one for pod in pods(overlay).values() for one in pod["containers"]}.items():
        args = " ".join(one["args"])
        if name == "gateway":
            assert one["readinessProbe"]["exec"]["command"] == probe(one["args"][5])
            # What a new start does not heal does not cause one.
            assert one["livenessProbe"]["exec"]["command"] == probe(one["args"][5], "liveness")
        elif name not in ("edge", "worker"):
            [port] = [port["containerPort"] for port in one["ports"] if port["name"] == "health"]
            assert f"--health-server-address=0.0.0.0:{port}" in args
            assert one["startupProbe"]["grpc"]["port"] == one["livenessProbe"]["grpc"]["port"] == port


def test_the_superlink_is_reached_by_the_edge_and_the_serverapp() -> None:
    assert allowed("coordinator", "superlink") == set()
    assert allowed("coordinator", "edge") == allowed("coordinator", "serverapp") == {"superlink:8000", "kube-dns:53"}
    [rule] = of("coordinator", "NetworkPolicy")["superlink"]["spec"]["ingress"]
    assert rule["from"][0]["podSelector"]["matchExpressions"][0]["values"] == ["edge", "serverapp"]
    services = of("coordinator", "Service")
    assert [name for name, one in services.items() if one["spec"].get("type", "ClusterIP") != "ClusterIP"] == ["edge"]


def test_the_worker_asks_for_a_gpu_where_it_is_told_to(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    file = tmp_path / "kubernetes" / "site" / "kustomization.yaml"
    file.write_text(file.read_text().replace("  - ../base\n", "  - ../base\n  - ../nvidia\n"))
    [pod] = [
        thing
        for thing in render(tmp_path / "kubernetes" / "site")
        if thing["kind"] == "Deployment" and thing["metadata"]["name"] == "executor"
    ]
    limits = {one["name"]: one["resources"]["limits"] for one in pod["spec"]["template"]["spec"]["containers"]}
    assert {name: limit.get("nvidia.com/gpu") for name, limit in limits.items()} == {"worker": 1, "executor": None}

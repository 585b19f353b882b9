"""Files in deploy/ are valid for their readers: compose, Kubernetes, a Dockerfile, policies."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from moto.iam.access_control import IAMPolicy, PermissionResult
from prefect.utilities.templating import apply_values

from sdpipeline.settings import setting_names
from tests.integration.compose_file import DEPLOY, composed, services, variables

ROOT = DEPLOY.parent
KUBERNETES = "1.33"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
OURS = ("bucket", "migrate", "prefect-server", "prefect-gateway", "deploy", "sealer", "cpu-worker", "gpu-worker")
THEIRS = ("postgres", "s3", "seaweedfs", "roles")
OUR_PODS = ("migrate", "prefect-server", "prefect-gateway", "deploy", "sealer", "cpu-worker", "gpu-pool")
HOLDERS = ("prefect-server", "prefect-gateway", "deploy")
PREFECT_PASSWORDS = {variables()["PREFECT_AUTH"], "admin:change-me"}


@cache
def rendered() -> list[Any]:
    """The kustomize base with its example secrets, as the API server would receive it."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed (Debian: kubernetes-client)")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(shutil.copytree(DEPLOY / "kubernetes", Path(folder) / "base"))
        for example in base.glob("secrets/*.example"):
            shutil.copy(example, example.with_suffix(""))
        for name in ("seal.pem", "seal.pub", "certificates_file.pem", "key_file.pem"):
            (base / "secrets" / name).write_text("a key")
        done = subprocess.run([kubectl, "kustomize", base], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def pods() -> dict[str, Any]:
    """Every pod that is defined, including that of the GPU job."""
    found = {
        m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in rendered() if "template" in m.get("spec", {})
    }
    return found | {"gpu-job": gpu_job()["spec"]["template"]["spec"]}


def gpu_job() -> Any:
    """The job that Prefect renders from the template and its defaults for one run."""
    template = json.loads((DEPLOY / "kubernetes" / "gpu-job-template.json").read_text())
    properties = template["variables"]["properties"]
    values = {name: each["default"] for name, each in properties.items() if "default" in each}
    run = {"command": ["prefect", "flow-run", "execute"], "env": [{"name": "A", "value": "1"}], "name": "a-run"}
    return apply_values(template["job_configuration"]["job_manifest"], values | run)


def test_the_compose_file_follows_the_specification() -> None:
    compose = PyCompose.from_yaml(yaml.safe_dump(composed()))
    compose.validate()
    assert set(compose.service_names()) == {*OURS, *THEIRS}


def test_every_secret_of_the_compose_file_comes_from_the_environment() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text))
    assert {name for name in variables() if "change-me" in variables()[name]} <= asked
    assert not re.search(r"(PASSWORD|SECRET|AUTH_STRING|SECRET_ACCESS_KEY): (?!\$)\S", text)


def test_nothing_is_published_beyond_this_machine() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_images_name_their_version() -> None:
    images = [service["image"] for service in services().values()]
    assert [image for image in images if ":" not in image or image.endswith(":latest")] == []


@pytest.mark.parametrize("name", OURS)
def test_our_containers_hold_no_more_rights_than_they_need(name: str) -> None:
    service = services()[name]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["build"]["target"] in re.findall(r"^FROM .* AS (\w+)$", DOCKERFILE, re.MULTILINE)


def test_files_that_are_mounted_exist() -> None:
    mounts = [mount for service in services().values() for mount in service.get("volumes", [])]
    files = [mount.split(":")[0] for mount in mounts if mount.startswith("./") and "/models" not in mount]
    assert files
    assert [file for file in files if not (DEPLOY / file).is_file()] == []


def settings_used() -> set[str]:
    compose = {name for service in services().values() for name in service.get("environment", {})}
    base = [*(DEPLOY / "kubernetes").glob("*.env"), *(DEPLOY / "kubernetes").glob("secrets/*.example")]
    files = {line.split("=")[0] for file in base for line in file.read_text().splitlines()}
    return compose | files | set(re.findall(r"\bSDP_\w+", DOCKERFILE))


def test_every_setting_that_is_named_exists() -> None:
    used = {name for name in settings_used() if name.startswith("SDP_")}
    assert {"SDP_DATABASE_URL", "SDP_STORAGE_URL"} <= used
    assert used - set(setting_names()) == set()


def test_every_manifest_is_valid() -> None:
    kinds = []
    for manifest in [*rendered(), gpu_job()]:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        kinds.append(manifest["kind"])
    assert {"Job", "Deployment", "NetworkPolicy", "Secret", "ConfigMap", "Role", "PersistentVolumeClaim"} <= set(kinds)


def test_what_is_not_kubernetes_is_refused() -> None:
    wrong = gpu_job()
    wrong["spec"]["template"]["spec"]["nodeSelektor"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", [*OUR_PODS, "gpu-job"])
def test_a_pod_runs_as_nobody_in_particular(name: str) -> None:
    pod = pods()[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


def test_a_gpu_job_asks_for_one_gpu_on_a_node_that_has_one() -> None:
    pod = gpu_job()["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    # The campaign's run starts a new pod, and expired leases make its jobs ready again.
    assert gpu_job()["spec"]["backoffLimit"] == 0


def test_the_pool_watches_the_namespace_that_its_role_is_for() -> None:
    (role,) = [m for m in rendered() if m["kind"] == "Role"]
    (watcher,) = pods()["gpu-pool"]["containers"]
    watched = {"name": "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES", "value": role["metadata"]["namespace"]}
    assert watcher["env"] == [watched]
    assert gpu_job()["metadata"]["namespace"] == role["metadata"]["namespace"]


def test_secrets_and_settings_that_pods_name_are_made() -> None:
    made = {m["metadata"]["name"] for m in rendered() if m["kind"] in {"Secret", "ConfigMap"}}
    named = set()
    for pod in pods().values():
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            named |= {next(iter(source.values()))["name"] for source in container["envFrom"]}
    assert named <= made
    assert {"owner", "prefect", "dispatcher", "worker", "sealer", "gateway", "sdpipeline"} <= named


def environment(pod: Any) -> dict[str, str]:
    """Every variable of a container of the pod, including those from its settings and secrets."""
    found: dict[str, str] = {}
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        for source in container.get("envFrom", []):
            found |= _values(next(m for m in rendered() if _names(source, m)))
        found |= {each["name"]: each.get("value", "") for each in container.get("env", [])}
    return found


def _names(source: Any, manifest: Any) -> bool:
    kind = {"configMapRef": "ConfigMap", "secretRef": "Secret"}
    return any(
        manifest["kind"] == kind[how] and manifest["metadata"]["name"] == named["name"] for how, named in source.items()
    )


def _values(manifest: Any) -> dict[str, str]:
    data: dict[str, str] = manifest["data"]
    secret = manifest["kind"] == "Secret"
    return {name: base64.b64decode(value).decode() if secret else value for name, value in data.items()}


def everything() -> dict[str, dict[str, str]]:
    """The environment of each of our services and pods."""
    compose = {name: services()[name].get("environment", {}) for name in services()}
    return compose | {f"pod {name}": environment(pod) for name, pod in pods().items()}


def test_only_the_sealer_has_the_key_that_seals_and_nobody_tells_it_what_to_run() -> None:
    assert [name for name, pod in pods().items() if '"seal-key"' in json.dumps(pod)] == ["sealer"]
    assert [name for name, service in services().items() if '"seal-key"' in json.dumps(service)] == ["sealer"]
    for name in ("sealer", "pod sealer"):
        assert [setting for setting in everything()[name] if setting.startswith("PREFECT_API")] == []
    for command in (services()["sealer"]["command"], pods()["sealer"]["containers"][0]["command"]):
        assert command == ["sdpipeline", "audit", "seal", "--watch"]


def test_the_prefect_password_is_with_the_server_the_gateway_and_what_ends() -> None:
    holders = {name for name, own in everything().items() if PREFECT_PASSWORDS & set(own.values())}
    assert holders == {f"{where}{name}" for where in ("", "pod ") for name in HOLDERS}
    kinds = {m["metadata"]["name"]: m["kind"] for m in rendered()}
    assert (services()["deploy"]["restart"], kinds["deploy"]) == ("no", "Job")


def test_workers_know_the_gateway_and_have_a_credential_of_their_role() -> None:
    given = everything()["prefect-gateway"]
    roles = {"cpu-worker": given["SDP_GATEWAY__DISPATCHER_AUTH"], "gpu-worker": given["SDP_GATEWAY__WORKER_AUTH"]}
    pod = everything()["pod prefect-gateway"]
    roles |= dict.fromkeys(("pod gpu-job", "pod gpu-pool"), pod["SDP_GATEWAY__WORKER_AUTH"])
    roles |= {"pod cpu-worker": pod["SDP_GATEWAY__DISPATCHER_AUTH"]}
    for name, auth in roles.items():
        own = everything()[name]
        assert own["PREFECT_API_URL"] == "http://prefect-gateway:4201/api"
        assert own["PREFECT_API_AUTH_STRING"] == auth
    assert len({*roles.values()} & PREFECT_PASSWORDS) == 0


def test_seaweedfs_listens_on_the_loopback_of_the_service_that_forwards_its_s3_port() -> None:
    served = services()["seaweedfs"]
    bound = {word.partition("=")[0]: word.partition("=")[2] for word in served["command"] if "=" in word}
    assert {bound["-ip"], bound["-ip.bind"], bound["-s3.ip.bind"]} == {"127.0.0.1"}
    assert (served["network_mode"], "networks" in served, "ports" in served) == ("service:s3", False, False)
    assert served["environment"]["WEED_JWT_FILER_SIGNING_KEY"]
    forwarded = composed()["configs"]["s3-port"]["content"]
    assert re.findall(r"bind (\S+)|server \S+ (\S+)", forwarded) == [
        (":8333", ""),
        ("", f"127.0.0.1:{bound['-s3.port']}"),
    ]


def test_pods_of_pictures_reach_the_gateway_and_not_the_server() -> None:
    def reach(way: str, app: str) -> set[str]:
        found = set()
        for policy in (m["spec"] for m in rendered() if m["kind"] == "NetworkPolicy"):
            for rule in policy.get(way, []) if _selects(policy["podSelector"], app) else []:
                found |= {name for peer in rule["from" if way == "ingress" else "to"] for name in _apps(peer)}
        return found

    workers = {"cpu-worker", "gpu-pool", "gpu-worker"}
    assert reach("ingress", "prefect-server") == {"prefect-gateway", "deploy"}
    assert reach("ingress", "prefect-gateway") == workers
    for app in (*workers, "sealer", "migrate"):
        assert "prefect-server" not in reach("egress", app)
    assert reach("egress", "gpu-worker") == {"prefect-gateway"}
    assert reach("egress", "sealer") == set()


def _selects(selector: Any, app: str) -> bool:
    return not selector or app in _apps({"podSelector": selector})


def _apps(peer: Any) -> set[str]:
    selector = peer.get("podSelector", {})
    named = {selector["matchLabels"]["app"]} if "matchLabels" in selector else set()
    return named | {value for each in selector.get("matchExpressions", []) for value in each["values"]}


def test_nobody_but_who_makes_pictures_has_the_key_that_signs_them() -> None:
    assert [name for name, pod in pods().items() if "picture-key" in json.dumps(pod)] == ["gpu-job"]
    assert [name for name, service in services().items() if "picture-key" in json.dumps(service)] == ["gpu-worker"]


def test_everything_starts_from_no_connections() -> None:
    (nothing,) = [m for m in rendered() if m["metadata"]["name"] == "nothing-by-default"]
    assert nothing["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_the_dockerfile_copies_what_there_is_and_ends_without_root() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert [name for names in copied for name in names.split() if not (ROOT / name).exists()] == []
    runtime = DOCKERFILE.partition("AS runtime")[2]
    assert re.search(r"^USER 10001$", runtime, re.MULTILINE)
    assert "USER root" not in runtime
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert {name for names in copied for name in names.split()} <= allowed


@pytest.mark.parametrize("path", sorted((DEPLOY / "policies").glob("*.json")), ids=lambda path: path.stem)
def test_no_policy_lets_anybody_bypass_retention(path: Path) -> None:
    statements = json.loads(path.read_text())["Statement"]
    allowed = [action for each in statements if each["Effect"] == "Allow" for action in each["Action"]]
    assert not {"s3:*", "s3:BypassGovernanceRetention", "s3:PutBucketObjectLockConfiguration"} & set(allowed)


PICTURE, INPUT = "team/spring/draft/f/sha.png", "inputs/0a1b"
SEAL, ARCHIVE = "audit/seals/00000001.json", "archive/team/spring/2026.jsonl.gz"


@pytest.mark.parametrize(
    ("policy", "action", "key", "allowed"),
    [
        ("worker", "GetObject", INPUT, True),
        ("worker", "PutObject", PICTURE, True),
        ("worker", "PutObject", SEAL, False),
        ("worker", "PutObject", ARCHIVE, False),
        ("worker", "DeleteObject", PICTURE, False),
        ("worker", "DeleteObjectVersion", SEAL, False),
        ("worker", "BypassGovernanceRetention", SEAL, False),
        ("dispatcher", "PutObject", INPUT, True),
        ("dispatcher", "PutObject", ARCHIVE, True),
        ("dispatcher", "PutObject", SEAL, False),
        ("dispatcher", "PutObjectRetention", SEAL, False),
        ("dispatcher", "DeleteObjectVersion", PICTURE, True),
        ("dispatcher", "DeleteObjectVersion", SEAL, False),
        ("dispatcher", "BypassGovernanceRetention", SEAL, False),
        ("sealer", "PutObject", SEAL, True),
        ("sealer", "PutObjectRetention", SEAL, True),
        ("sealer", "GetObject", SEAL, True),
        ("sealer", "PutObject", PICTURE, False),
        ("sealer", "GetObject", PICTURE, False),
        ("sealer", "DeleteObjectVersion", SEAL, False),
        ("sealer", "BypassGovernanceRetention", SEAL, False),
        ("reader", "GetObjectVersion", SEAL, True),
        ("reader", "PutObject", PICTURE, False),
        ("reader", "DeleteObject", PICTURE, False),
        ("bucket", "BypassGovernanceRetention", SEAL, False),
    ],
)
def test_a_policy_allows_its_own_work_and_no_other(policy: str, action: str, key: str, allowed: bool) -> None:
    found = IAMPolicy((DEPLOY / "policies" / f"{policy}.json").read_text())
    result = found.is_action_permitted(f"s3:{action}", f"arn:aws:s3:::BUCKET/PREFIX/{key}")
    assert (result is PermissionResult.PERMITTED) is allowed

"""The Kubernetes manifests are valid, and agree with the image and the server's settings."""

import re
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.routes import health
from server.settings.server import Settings
from tests.deploy.files import DEPLOY, ROOT
from tests.test_docs import EXTERNAL, VARIABLES

FOLDER = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu")
OLDEST = "1.30"
"""The oldest Kubernetes that has the manifests' fields, as docs/docker.md says."""
Manifest = dict[str, Any]


@cache
def render(path: Path) -> dict[str, Manifest]:
    """Manifest of each kind, rendered by a real Kustomize."""
    for command in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            found = list(yaml.safe_load_all(done.stdout))
            assert len({one["kind"] for one in found}) == len(found)
            return {one["kind"]: one for one in found}
    pytest.skip("neither kubectl nor kustomize here")


def written() -> list[tuple[str, Manifest]]:
    """Every manifest as it is in the files: (path, manifest)."""
    return [
        (str(file.relative_to(FOLDER)), manifest)
        for file in sorted(FOLDER.rglob("*.yaml"))
        for manifest in yaml.safe_load_all(file.read_text())
        if "kind" in manifest
    ]


WRITTEN = dict(written())


def container(manifest: Manifest) -> Manifest:
    (one,) = pod(manifest)["containers"]
    return dict(one)


def pod(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    return dict(spec["predictor"] if "predictor" in spec else spec["template"]["spec"])


def settings(overlay: str) -> dict[str, str]:
    return dict(render(FOLDER / "overlays" / overlay)["ConfigMap"]["data"])


def violations(manifest: Manifest, version: str) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as invalid:
            return str(invalid)
    return None


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_rendered_manifests_follow_kubernetes_schemas(overlay: str, version: str) -> None:
    rendered = render(FOLDER / "overlays" / overlay)
    kinds = {"ConfigMap", "Service", "StatefulSet", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    assert set(rendered) == kinds | {"ServiceMonitor"}
    for kind in kinds:  # the other is the operator's own
        assert violations(rendered[kind], version) is None, kind


def test_the_document_names_the_oldest_version() -> None:
    assert f"Kubernetes {OLDEST} or newer" in (ROOT / "docs/docker.md").read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_the_documented_command_makes_the_alerts_a_manifest() -> None:
    (command,) = re.findall(
        r"^(\{ printf .*?)kubectl apply .*?-f -$", (ROOT / "docs/docker.md").read_text(), re.M | re.S
    )
    done = subprocess.run(
        ["bash", "-c", command + "cat"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    manifest = yaml.safe_load(done.stdout)
    assert (manifest["kind"], manifest["metadata"]) == ("PrometheusRule", {"name": "bitdial"})
    assert manifest["spec"] == yaml.safe_load((DEPLOY / "alerts.yml").read_text())


def test_a_misspelled_field_would_be_found() -> None:
    wrong = yaml.safe_load((FOLDER / "base/pdb.yaml").read_text())
    assert violations(wrong, OLDEST) is None
    wrong["spec"]["maxUnavailabel"] = 1
    assert "maxUnavailabel" in str(violations(wrong, OLDEST))


def test_the_base_alone_needs_no_operator() -> None:
    rendered = render(FOLDER / "base")
    assert "ServiceMonitor" not in rendered
    assert rendered["StatefulSet"]["spec"]["replicas"] >= 2


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_autoscaler_decides_on_the_number_of_replicas(overlay: str) -> None:
    rendered = render(FOLDER / "overlays" / overlay)
    servers, scaler = rendered["StatefulSet"], rendered["HorizontalPodAutoscaler"]["spec"]
    assert "replicas" not in servers["spec"]
    target = {
        "apiVersion": servers["apiVersion"],
        "kind": servers["kind"],
        "name": servers["metadata"]["name"],
    }
    assert scaler["scaleTargetRef"] == target
    assert scaler["minReplicas"] >= 2
    averages = {
        one["pods"]["metric"]["name"]: one["pods"]["target"]["averageValue"] for one in scaler["metrics"]
    }
    assert int(averages["bitdial_requests_running"]) < Settings.model_fields["max_batch_size"].default


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_selects_the_servers(overlay: str) -> None:
    rendered = render(FOLDER / "overlays" / overlay)
    labels = rendered["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert rendered["StatefulSet"]["spec"]["selector"]["matchLabels"] == labels
    assert rendered["Service"]["spec"]["selector"] == labels
    assert rendered["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    monitor = rendered["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= rendered["Service"]["metadata"]["labels"].items()
    (endpoint,), (port,) = monitor["endpoints"], rendered["Service"]["spec"]["ports"]
    assert endpoint["port"] == port["name"]
    # Prometheus' job, which the alerts select, is the service's name
    assert rendered["Service"]["metadata"]["name"] == "bitdial"


SERVERS = [WRITTEN["base/statefulset.yaml"], WRITTEN["kserve.yaml"]]
EACH = pytest.mark.parametrize("server", SERVERS, ids=["statefulset", "kserve"])


@EACH
def test_a_server_meets_the_restricted_standard_of_pods(server: Manifest) -> None:
    """And runs as the image's user on a root file system that can't be written."""
    user = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.M)[-1]
    whole, own = pod(server)["securityContext"], container(server)["securityContext"]
    assert whole["runAsNonRoot"] is True
    assert (whole["runAsUser"], whole["runAsGroup"]) == tuple(map(int, user))
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    expected = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
    assert own == {**expected, "capabilities": {"drop": ["ALL"]}}
    assert pod(server)["automountServiceAccountToken"] is False
    written_to = {mount["mountPath"] for mount in container(server)["volumeMounts"]}
    assert written_to == {"/data", "/tmp"}  # the image's HF_HOME, and what libraries need


@EACH
def test_a_server_is_probed_where_it_answers_without_a_key(server: Manifest) -> None:
    paths = {route.path for route in health.router.routes if hasattr(route, "path")}
    probes = {
        name: one["httpGet"]["path"] for name, one in container(server).items() if name.endswith("Probe")
    }
    assert set(probes.values()) <= paths
    assert probes["livenessProbe"] == "/health/live"
    assert probes["readinessProbe"] == "/health/ready"


def test_a_model_may_be_downloaded_for_as_long_as_in_docker() -> None:
    probe = container(WRITTEN["base/statefulset.yaml"])["startupProbe"]
    minutes = re.findall(r"--start-period=(\d+)m", (ROOT / "Dockerfile").read_text())
    assert probe["periodSeconds"] * probe["failureThreshold"] == 60 * int(minutes[0])
    assert probe["httpGet"]["path"] == "/health/live"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_running_requests_may_finish_before_the_kill(overlay: str) -> None:
    servers = render(FOLDER / "overlays" / overlay)["StatefulSet"]
    grace = int(settings(overlay)["GRACEFUL_TERMINATION_TIMEOUT"])
    pause = container(servers)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(servers)["terminationGracePeriodSeconds"] > grace + pause


def test_kserve_waits_longer_than_the_graceful_timeout() -> None:
    default = Settings.model_fields["graceful_termination_timeout"].default
    assert pod(WRITTEN["kserve.yaml"])["terminationGracePeriodSeconds"] > default


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_reads_the_settings(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings(overlay)
    assert set(found) <= VARIABLES | EXTERNAL
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    Settings()


def test_kserve_passes_variables_that_the_server_reads() -> None:
    named = {one["name"] for one in container(WRITTEN["kserve.yaml"])["env"]}
    assert named - {"STORAGE_URI"} <= VARIABLES | EXTERNAL  # which KServe reads


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_keys_come_from_a_secret_that_prometheus_uses_too(overlay: str) -> None:
    rendered = render(FOLDER / "overlays" / overlay)
    sources = container(rendered["StatefulSet"])["envFrom"]
    (secret,) = (one["secretRef"] for one in sources if "secretRef" in one)
    assert "optional" not in secret, "without its keys a server would be open to all"
    (endpoint,) = rendered["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": secret["name"], "key": "API_KEY"}
    command = re.findall(r"create secret generic (\S+)", (ROOT / "docs/docker.md").read_text())
    assert command == [secret["name"]]


def test_the_cpu_overlay_has_memory_for_its_budget_and_the_gpu_overlay_a_card() -> None:
    cpu, gpu = (container(render(FOLDER / "overlays" / one)["StatefulSet"]) for one in OVERLAYS)
    assert cpu["resources"]["requests"] == cpu["resources"]["limits"]
    budget = re.fullmatch(r"(\d+)GiB", settings("cpu")["MEMORY_BUDGET"])
    limit = re.fullmatch(r"(\d+)Gi", cpu["resources"]["limits"]["memory"])
    assert budget is not None
    assert limit is not None
    assert int(limit[1]) >= int(budget[1]) + 1  # the process beside weights and caches
    assert "nvidia.com/gpu" not in cpu["resources"]["limits"]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert (cpu["image"], gpu["image"]) == ("bitdial:cpu", "bitdial:cuda")

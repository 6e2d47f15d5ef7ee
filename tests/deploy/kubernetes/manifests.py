"""What the tests of the Kubernetes manifests share: `kubectl kustomize` renders them, functions find things in them."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
KUSTOMIZE = DEPLOY / "kustomize"
OVERLAYS = sorted(f"overlays/{folder.name}" for folder in (KUSTOMIZE / "overlays").iterdir())
COMPONENTS = ("hpa", "keda", "monitoring", "networkpolicy", "gateway", "mtls")
PATHS = [*OVERLAYS, "jobs/storage", "jobs/pseudo-label", "jobs/train", "../ray"]  # all that is applied
TLS = "gateway/tls"
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None,
    reason="renders by kubectl: apt install kubectl, or https://kubernetes.io/docs/tasks/tools",
)


@lru_cache
def rendered(path: str) -> list[dict]:
    """The objects of a folder below deploy/kustomize; not to be changed."""
    return objects(kustomize(KUSTOMIZE / path))


def combined(components: Sequence[str], folder: Path) -> list[dict]:
    """The base with components, as an overlay in `folder` has it."""
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "namespace": "weakseg",
                "resources": [os.path.relpath(KUSTOMIZE / one, folder) for one in ("namespace", "base")],
                "components": [os.path.relpath(KUSTOMIZE / "components" / one, folder) for one in components],
            }
        )
    )
    return objects(kustomize(folder))


def kustomize(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def objects(text: str) -> list[dict]:
    return list(filter(None, yaml.safe_load_all(text)))


def of_kind(found: Sequence[dict], kind: str, name: str | None = None) -> list[dict]:
    return [one for one in found if one["kind"] == kind and name in (None, one["metadata"]["name"])]


def one(found: Sequence[dict], kind: str, name: str | None = None) -> dict:
    (only,) = of_kind(found, kind, name)
    return only


def pod_templates(found: Sequence[dict]) -> Iterator[tuple[str, dict]]:
    """(where it stands, template) of whatever makes pods."""
    for each in found:
        where = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] in ("Deployment", "Job"):
            yield where, each["spec"]["template"]
        elif each["kind"] == "RayJob":
            cluster = each["spec"]["rayClusterSpec"]
            yield f"{where}: submitter", each["spec"]["submitterPodTemplate"]
            yield f"{where}: head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{where}: {group['groupName']}", group["template"]


def containers(template: dict) -> list[dict]:
    return template["spec"].get("initContainers", []) + template["spec"]["containers"]


def container(found: Sequence[dict], name: str) -> dict:
    """The one container of that name."""
    (only,) = [each for _, template in pod_templates(found) for each in containers(template) if each["name"] == name]
    return only


def settings(found: Sequence[dict]) -> dict[str, str]:
    """Variables that the server's ConfigMap sets."""
    (source,) = [source["configMapRef"]["name"] for source in container(found, "server")["envFrom"]]
    return one(found, "ConfigMap", source)["data"]

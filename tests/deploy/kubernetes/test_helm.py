"""The chart renders what kustomize does: `make test-helm`, or any helm on the PATH."""

import re
import shutil
import subprocess

import pytest
import yaml

from serve.settings import ServeConfig
from tests.deploy.kubernetes.manifests import (
    DEPLOY,
    combined,
    container,
    needs_kubectl,
    objects,
    one,
    rendered,
    settings,
)
from weakseg.version import __version__

CHART = DEPLOY / "helm" / "weakseg"
MODEL = ("--set", "model.source=https://models.example.com/animals/1", "--set", f"model.sha256={'0' * 64}")
SWITCHES = {
    "hpa": "hpa",
    "keda": "keda",
    "monitoring": "monitoring",
    "networkpolicy": "networkPolicy",
    "gateway": "gateway",
    "mtls": "mtls",
}
needs_helm = pytest.mark.skipif(
    shutil.which("helm") is None, reason="renders by helm: make test-helm, or https://helm.sh/docs/intro/install"
)


def helm(*arguments, release="weakseg"):
    command = ["helm", "template", release, str(CHART), "--namespace", "weakseg", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def chart(*arguments, release="weakseg"):
    done = helm(*arguments, release=release)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def compared(found):
    """{(kind, name): object}, without what the two must say differently."""
    return {
        (each["kind"], each["metadata"]["name"]): each for each in map(stripped, found) if each["kind"] != "Namespace"
    }


def stripped(each):
    """Labels but those of pods and Deployments, and what rolls pods on a change: a name, a checksum."""
    each = yaml.safe_load(re.sub(r"\b(weakseg-(?:settings|model))-[0-9a-z]{10}\b", r"\1", yaml.safe_dump(each)))
    if each["kind"] == "Deployment":
        for name in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
            each["metadata"]["labels"].pop(name, None)
        each["spec"]["template"]["metadata"]["annotations"].pop("checksum/config", None)
    else:
        del each["metadata"]["labels"]
    return each


@needs_helm
@needs_kubectl
@pytest.mark.parametrize(
    "components",
    [
        (),
        ("hpa", "monitoring", "networkpolicy"),
        ("keda", "monitoring"),
        ("gateway",),
        ("mtls",),
        ("hpa", "monitoring", "networkpolicy", "gateway", "mtls", "gateway/tls"),
    ],
    ids="+".join,
)
def test_it_renders_what_kustomize_does(components, tmp_path):
    switches = [f"--set={SWITCHES[name]}.enabled=true" for name in components if name in SWITCHES]
    assert compared(chart(*MODEL, *switches)) == compared(combined(components, tmp_path))


@needs_helm
@needs_kubectl
def test_on_gpus(tmp_path):
    digest = "sha256:" + "0" * 64
    switches = [f"--set={SWITCHES[name]}.enabled=true" for name in ("hpa", "monitoring", "networkpolicy")]
    image = ["--set", f"image.digest={digest}", "--set", "image.repository=registry.example.com/weakseg/serve-gpu"]
    found = chart(*MODEL, *switches, "--values", str(CHART / "values-gpu.yaml"), *image)
    assert compared(found) == compared(rendered("overlays/gpu"))


@needs_helm
@needs_kubectl
def test_a_canary_is_a_release_of_that_name():
    digest = "sha256:" + "0" * 64
    image = ["--set", f"image.digest={digest}", "--set", "image.repository=registry.example.com/weakseg/serve-cpu"]
    model = [argument.replace("animals/1", "animals/2") for argument in MODEL]
    found = compared(chart(*model, *image, "--set", "replicas=1", release="weakseg-canary"))
    text = yaml.safe_dump_all(rendered("overlays/canary"))
    text = re.sub(r"weakseg-(settings|model|headless)-canary(-[0-9a-z]{10})?\b", r"weakseg-canary-\1", text)
    assert found == compared(objects(text))


@needs_helm
def test_none_is_a_number_of_servers():
    assert one(chart(*MODEL, "--set", "replicas=0"), "Deployment")["spec"]["replicas"] == 0
    assert "replicas" not in one(chart(*MODEL), "Deployment")["spec"]


@needs_helm
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), r"model[./]source"),
        ((*MODEL, "--set", "model.sha256=latest"), r"model[./]sha256"),
        ((*MODEL, "--set", "image.tag=latest"), r"image[./]tag"),
        ((*MODEL, "--set", "hpa.enable=true"), r"dditional propert(y|ies) '?enable'? (is )?not allowed"),
        ((*MODEL, "--set", "replica=2"), r"dditional propert(y|ies) '?replica'? (is )?not allowed"),
        ((*MODEL, "--set", "hpa.enabled=true", "--set", "keda.enabled=true"), "enable one of them"),
        ((*MODEL, "--set", "replicas=3", "--set", "hpa.enabled=true"), "leave replicas out"),
    ],
)
def test_wrong_values_are_refused(arguments, said):
    """In the words of Helm 3 or 4."""
    done = helm(*arguments)
    assert done.returncode != 0 and re.search(said, done.stderr)


def test_its_versions_are_ours():
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["version"] == about["appVersion"] == __version__


def test_its_settings_exist():
    for name in ("values.yaml", "values-gpu.yaml"):
        assert set(yaml.safe_load((CHART / name).read_text())["settings"]) <= set(ServeConfig.model_fields)


@needs_kubectl
def test_its_figures_are_those_of_kustomize(tmp_path):
    """Which the tests above see, too, where there is a helm."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    found = combined(["hpa"], tmp_path)
    assert {f"WEAKSEG_{key.upper()}": str(value) for key, value in values["settings"].items()} == settings(found)
    spec = one(found, "HorizontalPodAutoscaler")["spec"]
    targets = [metric["pods"]["target"]["averageValue"] for metric in spec["metrics"]]
    assert [spec["minReplicas"], spec["maxReplicas"]] == [values["scaling"]["min"], values["scaling"]["max"]]
    assert targets == [str(values["scaling"][name]) for name in ("queueDepth", "inflight")]
    assert container(found, "server")["resources"] == values["resources"]

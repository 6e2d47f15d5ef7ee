"""What the manifests name exists: a flag, variable, port, metric or service that is renamed in the code fails here."""

import re

import pytest
import tyro

import weakseg.bundle_commands
from serve.inference import grpc_inference_service_pb2
from serve.metrics import Metrics
from serve.settings import PREFIX, ServeConfig, read_config
from tests.deploy.kubernetes.manifests import (
    KUSTOMIZE,
    OVERLAYS,
    PATHS,
    ROOT,
    combined,
    containers,
    needs_kubectl,
    of_kind,
    one,
    pod_templates,
    rendered,
    settings,
)
from weakseg import cli
from weakseg.batch.commands import INDEX_VARIABLE, Arguments
from weakseg.recipe_loading import load_recipe, override
from weakseg.v1 import segmentation_service_pb2

pytestmark = needs_kubectl


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All objects of overlays, jobs and components."""
    folders = [tmp_path_factory.mktemp("all") for _ in range(2)]
    found = combined(["hpa", "monitoring", "networkpolicy", "gateway", "mtls", "gateway/tls"], folders[0])
    found = found + combined(["keda"], folders[1])
    for path in PATHS:
        found = found + rendered(path)
    return found


@pytest.mark.parametrize("path", ["base", *OVERLAYS])
def test_the_server_takes_the_settings(path, monkeypatch):
    for key, value in settings(rendered(path)).items():
        monkeypatch.setenv(key, value)
    config = read_config()
    assert str(config.models) == "/models"


def test_it_takes_those_of_mtls(monkeypatch, tmp_path):
    for key, value in settings(combined(["mtls"], tmp_path)).items():
        monkeypatch.setenv(key, value)
    tls = read_config().tls
    assert tls is not None and tls.client_ca is not None


def test_variables(everything):
    """Of the server's own prefix no other variable is set, in no container."""
    names = set()
    for each in of_kind(everything, "ConfigMap"):
        names |= {name for name in each["data"] if not name.endswith(".json")}
    for _, template in pod_templates(everything):
        for each in containers(template):
            names |= {variable["name"] for variable in each.get("env", [])}
    ours = {name for name in names if name.startswith(PREFIX)}
    assert len(ours) > 5
    assert ours <= {PREFIX + field.upper() for field in ServeConfig.model_fields}
    of_others = {"NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RAY_USAGE_STATS_ENABLED"}
    assert names - ours == {"MODEL_SOURCE", "MODEL_SHA256", *of_others}


def test_ports(everything):
    config = ServeConfig()
    for _, template in pod_templates(everything):
        for each in containers(template):
            if each["name"] != "server":
                continue
            assert {port["name"]: port["containerPort"] for port in each["ports"]} == {
                "grpc": config.port,
                "metrics": config.metrics_port,
            }
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                ask = each[probe]
                assert ask["grpc"]["port"] == config.port if "grpc" in ask else ask["httpGet"]["port"] == 9464
    for each in of_kind(everything, "Service"):
        assert all(port["port"] == config.port for port in each["spec"]["ports"])


def test_commands(everything):
    """Every command is a verb with flags that it knows, every reference to a variable is of one that is set."""
    for where, template in pod_templates(everything):
        for each in containers(template):
            if each["name"] in ("ray", "submit"):  # KubeRay's
                continue
            program, *verbs = each["command"]
            args = each.get("args", [])
            if program == "torchrun":
                args = args[args.index("weakseg") + 1 :]
                verbs, args = args[:1], args[1:]
                override(load_recipe(args[0]), args[1:])
            assert program in ("weakseg", "torchrun") and verbs[0] in cli.VERBS, where
            if verbs == ["bundle", "fetch"]:
                weakseg.bundle_commands._parser().parse_args(["fetch", *args])
            elif verbs == ["pseudo-label"]:
                parsed = tyro.cli(Arguments, args=args)
                assert parsed.shard_index is None, f"left to {INDEX_VARIABLE}"
            else:
                assert args == [] or verbs == ["run"], where


def test_metrics(everything):
    """Those that servers are scaled by; those of rules are tested where these are."""
    asked = set()
    for each in of_kind(everything, "HorizontalPodAutoscaler"):
        asked |= {metric["pods"]["metric"]["name"] for metric in each["spec"]["metrics"]}
    for each in of_kind(everything, "ScaledObject"):
        for trigger in each["spec"]["triggers"]:
            asked |= set(re.findall(r"\bweakseg_\w+", trigger["metadata"].get("query", "")))
    assert len(asked) == 2
    assert asked <= {family.name for family in Metrics().registry.collect()}


def test_services_of_grpc(everything):
    known = {
        segmentation_service_pb2.DESCRIPTOR.services_by_name["SegmentationService"].full_name,
        grpc_inference_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
        "grpc.health.v1.Health",
    }
    for each in of_kind(everything, "GRPCRoute"):
        assert {match["method"]["service"] for rule in each["spec"]["rules"] for match in rule["matches"]} == known


def test_references(everything):
    """ConfigMaps, claims and accounts that are mounted or read are there, or made by the operator, as documented."""
    by_hand = {"weakseg-signing-key"}
    there = {(each["kind"], each["metadata"]["name"]) for each in everything}
    for where, template in pod_templates(everything):
        for volume in template["spec"].get("volumes", []):
            if "configMap" in volume:
                assert volume["configMap"]["name"] in by_hand, where
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there, where
        for each in containers(template):
            for source in each.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in there, where
        account = template["spec"].get("serviceAccountName")
        assert account is None or ("ServiceAccount", account) in there, where


def test_the_label_that_counts_bulk_clients():
    (trigger,) = one(rendered("overlays/bulk"), "ScaledObject")["spec"]["triggers"]
    label, _, value = trigger["metadata"]["podSelector"].partition("=")
    assert value == "true"
    for text in (KUSTOMIZE / "overlays" / "bulk" / "kustomization.yaml", ROOT / "docs" / "kubernetes.md"):
        assert label in text.read_text()

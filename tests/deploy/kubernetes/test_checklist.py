"""What a server on Kubernetes has to have, item by item."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

import weakseg
from serve.settings import ServeConfig
from tests.deploy.kubernetes.manifests import (
    COMPONENTS,
    DEPLOY,
    KUSTOMIZE,
    OVERLAYS,
    PATHS,
    combined,
    container,
    containers,
    needs_kubectl,
    of_kind,
    one,
    pod_templates,
    rendered,
    settings,
)

pytestmark = needs_kubectl
RELEASED = [path for path in PATHS if path not in ("overlays/dev", "jobs/storage")]


def pod(found):
    """The server's pod."""
    return one(found, "Deployment")["spec"]["template"]["spec"]


@pytest.fixture
def with_component(tmp_path):
    return lambda *names: combined(names, tmp_path)


# Everything that makes pods


@pytest.mark.parametrize("path", PATHS)
def test_labels_and_namespace(path):
    for each in rendered(path):
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == labels["app.kubernetes.io/part-of"] == "weakseg"
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == "weakseg"
    for _, template in pod_templates(rendered(path)):
        assert template["metadata"]["labels"]["app.kubernetes.io/component"] in ("server", "pseudo-label", "train")


@pytest.mark.parametrize("path", RELEASED)
def test_images_by_digest(path):
    for _, template in pod_templates(rendered(path)):
        for each in containers(template):
            name, _, digest = each["image"].partition("@sha256:")
            assert len(digest) == 64 and ":" not in name


def test_images_of_the_base_are_of_this_version():
    for path in ("base", "overlays/dev"):
        for each in containers(one(rendered(path), "Deployment")["spec"]["template"]):
            assert each["image"] == f"weakseg/serve-cpu:{weakseg.__version__}"
    for path in ("base", "jobs/pseudo-label", "jobs/train"):
        for each in rendered(path):
            assert each["metadata"]["labels"]["app.kubernetes.io/version"] == weakseg.__version__


@pytest.mark.parametrize("path", PATHS)
def test_pods_may_do_nothing_but_their_work(path):
    for where, template in pod_templates(rendered(path)):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (10001, 10001, 10001)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in containers(template):
            context = each["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context.get("readOnlyRootFilesystem") is (None if each["name"] in ("ray", "submit") else True), where


@pytest.mark.parametrize("path", PATHS)
def test_volumes_are_bounded_and_all_there(path):
    for where, template in pod_templates(rendered(path)):
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        for volume in volumes.values():
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]
        mounted = {mount["name"] for each in containers(template) for mount in each.get("volumeMounts", [])}
        assert mounted == set(volumes), where
        for each in containers(template):
            if each["name"] != "submit":
                assert "/tmp" in [mount["mountPath"] for mount in each["volumeMounts"]]


@pytest.mark.parametrize("path", PATHS)
def test_memory_is_what_was_asked_for_and_cores_are_whole(path):
    for where, template in pod_templates(rendered(path)):
        for each in containers(template):
            requests, limits = each["resources"]["requests"], each["resources"]["limits"]
            assert requests["memory"] == limits["memory"], where
            assert requests["cpu"]
            assert "cpu" not in limits or limits["cpu"].isdecimal(), f"{where}: a quota of a part of a core"


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("overlays/dev", "jobs/storage", "jobs/train")])
def test_models_are_fetched_verified_and_then_read_only(path):
    for where, template in pod_templates(rendered(path)):
        if where.endswith("submitter"):
            continue
        (fetch,) = template["spec"]["initContainers"]
        assert fetch["command"] == ["weakseg", "bundle", "fetch"]
        assert "--public-key" in str(fetch["args"]) and "--sha256" in str(fetch["args"])
        (main,) = template["spec"]["containers"]
        mounts = {mount["name"]: mount for mount in main["volumeMounts"]}
        assert mounts["models"] == {"name": "models", "mountPath": "/models", "readOnly": True}
        assert {"name": "signing-key", "mountPath": "/etc/weakseg/signing", "readOnly": True} in fetch["volumeMounts"]


# The server


@pytest.mark.parametrize("path", [path for path in OVERLAYS if path != "overlays/gpu"])
def test_no_server_goes_before_the_next_has_come(path):
    spec = one(rendered(path), "Deployment")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert spec["minReadySeconds"] == 5


@pytest.mark.parametrize("path", OVERLAYS)
def test_servers_are_spread_and_not_all_drained_at_once(path):
    deployment = one(rendered(path), "Deployment")
    labels = deployment["spec"]["selector"]["matchLabels"]
    spread = pod(rendered(path))["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert all(each["labelSelector"]["matchLabels"] == labels for each in spread)
    budget = one(rendered(path), "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1 and budget["selector"]["matchLabels"] == labels


@pytest.mark.parametrize("path", OVERLAYS)
def test_probes(path):
    server = container(rendered(path), "server")
    startup, liveness, readiness = (server[f"{name}Probe"] for name in ("startup", "liveness", "readiness"))
    assert startup["grpc"] == readiness["grpc"] == {"port": 8500, "service": "readiness"}
    assert liveness["grpc"] == {"port": 8500, "service": "liveness"}
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    assert all(
        probe["timeoutSeconds"] > 1 for probe in (startup, liveness, readiness)
    )  # 1 is the default, and too short


@pytest.mark.parametrize("path", OVERLAYS)
def test_there_is_time_to_drain(path):
    told = settings(rendered(path))
    before = container(rendered(path), "server")["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = before + float(told["WEAKSEG_DRAIN_DELAY_S"]) + float(told["WEAKSEG_DRAIN_GRACE_S"]) + 5
    assert pod(rendered(path))["terminationGracePeriodSeconds"] >= needed


@pytest.mark.parametrize("path", OVERLAYS)
def test_services_for_clients_that_balance_and_for_meshes(path):
    labels = one(rendered(path), "Deployment")["spec"]["selector"]["matchLabels"]
    plain, headless = sorted(of_kind(rendered(path), "Service"), key=lambda each: "clusterIP" in each["spec"])
    assert headless["spec"]["clusterIP"] == "None"
    for each in (plain, headless):
        assert each["spec"]["selector"] == labels
        (port,) = each["spec"]["ports"]
        assert (port["name"], port["port"], port["appProtocol"]) == ("grpc", 8500, "kubernetes.io/h2c")
    assert 0 < float(settings(rendered(path))["WEAKSEG_MAX_CONNECTION_AGE_S"]) <= 300


def test_gpu():
    found = rendered("overlays/gpu")
    spec = pod(found)
    assert container(found, "server")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["nodeSelector"] and spec["runtimeClassName"] == "nvidia"
    assert one(found, "Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert settings(found)["WEAKSEG_PROVIDER"] == "cuda"
    assert all("serve-gpu@" in each["image"] for each in containers(one(found, "Deployment")["spec"]["template"]))


def test_a_canary_is_beside_the_others_and_gets_none_of_their_calls():
    stable, canary = rendered("overlays/cpu"), rendered("overlays/canary")
    names = {(each["kind"], each["metadata"]["name"]) for each in stable}
    assert names.isdisjoint((each["kind"], each["metadata"]["name"]) for each in canary)
    selectors = [one(found, "Deployment")["spec"]["selector"]["matchLabels"] for found in (stable, canary)]
    assert [each["app.kubernetes.io/instance"] for each in selectors] == ["weakseg", "weakseg-canary"]


# Components


def test_scaled_by_what_waits_and_is_inside(with_component):
    found = with_component("hpa")
    spec = one(found, "HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"]["name"] == one(found, "Deployment")["metadata"]["name"]
    assert [metric["pods"]["metric"]["name"] for metric in spec["metrics"]] == [
        "weakseg_queue_depth",
        "weakseg_inflight",
    ]
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert spec["minReplicas"] >= 2
    assert "replicas" not in one(found, "Deployment")["spec"], "applying it again would undo what was scaled"


def test_keda_does_the_same(with_component, tmp_path):
    scaled = one(with_component("keda"), "ScaledObject")["spec"]
    hpa = one(with_component("hpa"), "HorizontalPodAutoscaler")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    for trigger, metric in zip(scaled["triggers"], hpa["metrics"], strict=True):
        assert metric["pods"]["metric"]["name"] in trigger["metadata"]["query"]
        assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]


def test_the_adapter_serves_what_the_hpa_asks_for(with_component):
    values = yaml.safe_load((KUSTOMIZE / "components" / "hpa" / "prometheus-adapter.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    (pattern,) = re.findall(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    for metric in one(with_component("hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"]:
        assert re.fullmatch(pattern, metric["pods"]["metric"]["name"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="reads queries by promtool: apt install prometheus")
def test_prometheus_reads_the_queries_that_scale(with_component, tmp_path):
    values = yaml.safe_load((KUSTOMIZE / "components" / "hpa" / "prometheus-adapter.yaml").read_text())
    query = values["rules"]["custom"][0]["metricsQuery"]
    for hole, text in (
        ("Series", "weakseg_inflight"),
        ("LabelMatchers", 'namespace="weakseg",pod=~"a|b"'),
        ("GroupBy", "pod"),
    ):
        query = query.replace(f"<<.{hole}>>", text)
    queries = [query, values["rules"]["custom"][0]["seriesQuery"]]
    queries += [
        trigger["metadata"]["query"] for trigger in one(with_component("keda"), "ScaledObject")["spec"]["triggers"]
    ]
    rules = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(tmp_path / "rules.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bulk_servers_go_to_zero_and_jobs_bring_them_back():
    found = rendered("overlays/bulk")
    spec = one(found, "ScaledObject")["spec"]
    assert spec["minReplicaCount"] == 0
    assert spec["scaleTargetRef"]["name"] == one(found, "Deployment")["metadata"]["name"]


def test_monitoring_finds_the_metrics_port_of_every_server(with_component):
    found = with_component("monitoring")
    spec = one(found, "PodMonitor")["spec"]
    for path in OVERLAYS:
        template = one(rendered(path), "Deployment")["spec"]["template"]
        assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in container(found, "server")["ports"]]
    assert endpoint["path"] == "/metrics"
    assert one(found, "Deployment")["spec"]["template"]["metadata"]["labels"][spec["jobLabel"]] == "weakseg"


def test_the_rules_are_those_of_prometheus(with_component):
    """`make manifests` writes them."""
    rules = yaml.safe_load((DEPLOY / "monitoring" / "rules.yaml").read_text())
    assert one(with_component("monitoring"), "PrometheusRule")["spec"] == rules


def test_grafana_finds_every_dashboard(with_component):
    maps = [
        each
        for each in of_kind(with_component("monitoring"), "ConfigMap")
        if "grafana_dashboard" in each["metadata"]["labels"]
    ]
    files = {name: json.loads(text) for each in maps for name, text in each["data"].items()}
    there = {path.name: json.loads(path.read_text()) for path in (DEPLOY / "monitoring" / "dashboards").iterdir()}
    assert files == there
    assert all(len(json.dumps(each)) < 2**18 for each in maps), "kubectl apply keeps what it applied in an annotation"


def test_nothing_comes_or_goes_but_what_is_allowed(with_component):
    found = with_component("networkpolicy")
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ingress = policies["weakseg-server"]["ingress"]
    assert [rule["ports"] for rule in ingress] == [[{"protocol": "TCP", "port": port}] for port in (8500, 9464)]
    assert "weakseg.io/client" in json.dumps(ingress[0]["from"]) and "monitoring" in json.dumps(ingress[1]["from"])
    assert policies["weakseg-server"]["policyTypes"] == ["Ingress"], "the server itself asks nobody"
    egress = policies["weakseg-fetch-model"]["egress"]
    assert sorted(port["port"] for rule in egress for port in rule["ports"]) == [53, 53, 443]
    for selector in (policies["weakseg-server"], policies["weakseg-fetch-model"]):
        labels = one(found, "Deployment")["spec"]["template"]["metadata"]["labels"]
        assert selector["podSelector"]["matchLabels"].items() <= labels.items()


def test_gateway_routes_our_services_and_the_canary_by_header(with_component):
    found = with_component("gateway")
    canary, stable = one(found, "GRPCRoute")["spec"]["rules"]
    assert all(match["headers"] == [{"name": "weakseg-canary", "value": "true"}] for match in canary["matches"])
    for rule, name, path in ((canary, "weakseg-canary", "overlays/canary"), (stable, "weakseg", "base")):
        (backend,) = rule["backendRefs"]
        assert backend["name"] == name
        assert backend["port"] == one(rendered(path), "Service", name)["spec"]["ports"][0]["port"]
    assert one(found, "GRPCRoute")["spec"]["hostnames"] == [one(found, "Gateway")["spec"]["listeners"][0]["hostname"]]


def test_with_mtls_probes_go_to_the_metrics_port(with_component):
    found = with_component("mtls")
    server = container(found, "server")
    paths = [server[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    assert paths == [{"port": 9464, "path": path} for path in ("/readyz", "/livez", "/readyz")]
    assert all("grpc" not in server[f"{name}Probe"] for name in ("startup", "liveness", "readiness"))
    (folder,) = [mount["mountPath"] for mount in server["volumeMounts"] if mount["name"] == "tls"]
    files = {key: value for key, value in settings(found).items() if key.startswith("WEAKSEG_TLS_")}
    assert files == {
        "WEAKSEG_TLS_CERT": f"{folder}/tls.crt",
        "WEAKSEG_TLS_KEY": f"{folder}/tls.key",
        "WEAKSEG_TLS_CLIENT_CA": f"{folder}/ca.crt",
    }
    assert all("appProtocol" not in each["spec"]["ports"][0] for each in of_kind(found, "Service"))


def test_the_gateway_speaks_tls_to_servers_that_do(with_component):
    found = with_component("gateway", "mtls", "gateway/tls")
    targets = [policy["spec"]["targetRefs"] for policy in of_kind(found, "BackendTLSPolicy")]
    backends = [ref["name"] for rule in one(found, "GRPCRoute")["spec"]["rules"] for ref in rule["backendRefs"]]
    assert sorted(ref["name"] for (ref,) in targets) == sorted(backends)
    assert one(found, "Gateway")["spec"]["tls"]["backend"]["clientCertificateRef"]["name"]


def test_every_component_is_tested():
    assert {path.name for path in (KUSTOMIZE / "components").iterdir()} == set(COMPONENTS)


# Jobs


def test_shards_of_an_indexed_job():
    spec = one(rendered("jobs/pseudo-label"), "Job")["spec"]
    assert spec["completionMode"] == "Indexed" and spec["template"]["spec"]["restartPolicy"] == "Never"
    assert f"--num-shards={spec['completions']}" in container(rendered("jobs/pseudo-label"), "pseudo-label")["args"]
    assert spec["backoffLimitPerIndex"] and "backoffLimit" not in spec
    assert spec["maxFailedIndexes"] < spec["completions"]


@pytest.mark.parametrize("path", ["jobs/pseudo-label", "jobs/train"])
def test_what_is_worth_another_try(path):
    """docs/batch.md: 2 wrong arguments, 3 too many bad images, 42 all are bad; a lost node is nobody's fault."""
    spec = one(rendered(path), "Job")["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules[1:]}
    assert codes == ({"FailJob": [2], "FailIndex": [3, 42]} if path == "jobs/pseudo-label" else {"FailJob": [2]})
    (main,) = spec["template"]["spec"]["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules[1:]} == {main["name"]}


def test_a_process_a_gpu():
    train = container(rendered("jobs/train"), "train")
    assert train["command"] == ["torchrun"]
    assert f"--nproc-per-node={train['resources']['limits']['nvidia.com/gpu']}" in train["args"]
    assert any(mount["mountPath"] == "/dev/shm" for mount in train["volumeMounts"])


def test_drain_settings_are_those_of_the_server():
    """What is told again in settings.env is what holds anyway."""
    told = settings(rendered("base"))
    defaults = ServeConfig()
    for name in ("drain_delay_s", "drain_grace_s"):
        assert float(told[f"WEAKSEG_{name.upper()}"]) == getattr(defaults, name)

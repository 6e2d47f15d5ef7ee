"""deploy/monitoring/rules.yaml: promtool's own tests, and that it names nothing that is not there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from serve.metrics import SECONDS
from tests.deploy.monitoring.promql import asked

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
RULES = ROOT / "deploy" / "monitoring" / "rules.yaml"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
TESTS = yaml.safe_load((HERE / "rules.test.yaml").read_text())["tests"]
OF_TARGETS = {"namespace", "job", "instance"}  # of Prometheus and Kubernetes, not of what is scraped
# Reasons that are the client's fault, or its operator's; the others of weakseg/errors.py are the server's.
OF_CLIENTS = {
    "SERVICE",  # never raised itself
    "INVALID_REQUEST",
    "MODEL_NOT_FOUND",
    "MODEL_NEEDED",
    "FOLDERS_UNREADABLE",
    "OUTPUT_UNSUPPORTED",
    "DEADLINE_TOO_SHORT",  # counted by its code, with deadlines that pass
    "RESPONSE_TOO_LARGE",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "RATE_LIMITED",
}


@pytest.fixture(scope="module")
def promtool():
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    return path


@pytest.fixture
def alerts(rules):
    return [rule for rule in rules if "alert" in rule]


@pytest.mark.parametrize("command", [["check", "rules", RULES], ["test", "rules", HERE / "rules.test.yaml"]])
def test_promtool(promtool, command):
    done = subprocess.run([promtool, *map(str, command)], check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_each_alert_is_tested_to_fire_and_to_be_silent(alerts):
    checks = [check for test in TESTS for check in test["alert_rule_test"]]
    fired = {(c["alertname"], a["exp_labels"]["severity"]) for c in checks for a in c["exp_alerts"]}
    assert fired == {(alert["alert"], alert["labels"]["severity"]) for alert in alerts}
    assert {c["alertname"] for c in checks if not c["exp_alerts"]} == {alert["alert"] for alert in alerts}


def test_every_metric_and_label_is_exposed(rules, recorded, exposed):
    slos = {rule["labels"]["slo"] for rule in rules if "slo" in rule.get("labels", {})} & set(
        re.findall(r'slo="(\w+)"', RULES.read_text())
    )
    for rule in rules:
        found = asked(rule["expr"])
        assert found.metrics <= exposed.labels.keys() | recorded, rule
        own = set().union(*(exposed.labels[metric].keys() for metric in found.metrics & exposed.labels.keys()))
        assert found.labels <= own | OF_TARGETS | {"slo"}, rule
        for metric, label, value in found.matchers:
            if metric in recorded:
                assert label == "slo" and value in slos, rule
            elif label not in OF_TARGETS:
                assert label in exposed.labels[metric], rule
                known = exposed.values(metric, label)
                assert set(value.split("|")) <= known, (rule, known)


def test_each_reason_is_the_fault_of_the_server_or_of_a_client(rules, service_reasons):
    (errors,) = (
        rule["expr"]
        for rule in rules
        if rule.get("record") == "slo:weakseg_errors:rate5m" and rule["labels"]["slo"] == "availability"
    )
    of_server = {one for _, label, value in asked(errors).matchers if label == "reason" for one in value.split("|")}
    assert of_server - {"INTERNAL"} == service_reasons - OF_CLIENTS


def test_bounds_are_buckets_that_every_version_of_prometheus_writes_alike(rules):
    """1 is `1.0` in some formats and `1` in others."""
    bounds = {value for rule in rules for _, label, value in asked(rule["expr"]).matchers if label == "le"}
    assert bounds and bounds <= {str(bound) for bound in SECONDS if isinstance(bound, float)}


def test_each_objective_is_told_in_each_window(rules):
    by_record = {}
    for rule in rules:
        by_record.setdefault(rule.get("record"), set()).add(rule.get("labels", {}).get("slo"))
    budgets = by_record["slo:weakseg_error_budget:ratio"]
    assert budgets == by_record["slo:weakseg_events:rate5m"] == by_record["slo:weakseg_errors:rate5m"]
    for slo in budgets:
        pairs = set()
        for rule in rules:
            pairs |= set(re.findall(rf'rate(\w+){{slo="{slo}"}} > ([\d.]+)', rule["expr"]))
        assert pairs == {
            *(("1h", "14.4"), ("5m", "14.4"), ("6h", "6"), ("30m", "6")),
            *(("1d", "3"), ("2h", "3"), ("3d", "1"), ("6h", "1")),
        }


def test_alerts_say_how_urgent_they_are_and_lead_to_the_runbook(alerts):
    for alert in alerts:
        assert alert["labels"].keys() == {"severity"} and alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"].keys() == {"summary", "runbook_url"}
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"


def test_the_runbook_has_a_section_for_each_alert_and_no_other(alerts):
    sections = re.split(r"^## (Weakseg\w+)\n", RUNBOOK, flags=re.MULTILINE)[1:]
    named = dict(zip(sections[::2], sections[1::2], strict=True))
    assert named.keys() == {alert["alert"] for alert in alerts}
    for name, text in named.items():
        assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == ["Meaning", "Impact", "Look", "Do"], name


def test_metrics_of_the_runbook_are_exposed(exposed, recorded):
    named = set(re.findall(r"`((?:weakseg|process|grpc_server)_\w+)", RUNBOOK))
    assert named and named <= exposed.labels.keys() | recorded | {"weakseg_stage_duration_seconds"}

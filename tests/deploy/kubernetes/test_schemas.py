"""Every object of every overlay and combination of components is what Kubernetes or its operators know, no more."""

import itertools
import json
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.deploy.kubernetes.manifests import COMPONENTS, PATHS, TLS, combined, needs_kubectl, pod_templates, rendered

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="the schemas of Kubernetes: pip install 'weakseg[manifests]'"
)
pytestmark = needs_kubectl

# The oldest that has all that we use on by default (preStop.sleep), one between, and the newest two of the package.
VERSIONS = ["1.30", "1.33", *kubernetes_validate.utils.all_versions()[-2:]]
SCHEMAS = {path.stem: yaml.safe_load(path.read_text()) for path in (Path(__file__).parent / "schemas").glob("*.yaml")}
# The definitions are megabytes, and read anew for each object.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)


def combinations():
    """Subsets of the components; one of the two that scale, and the gateway's TLS with both of what it joins."""
    others = [name for name in COMPONENTS if name not in ("hpa", "keda")]
    for scaler in ((), ("hpa",), ("keda",)):
        for n in range(len(others) + 1):
            for some in itertools.combinations(others, n):
                yield (*scaler, *some, *((TLS,) if {"gateway", "mtls"} <= {*some} else ()))


def check(found):
    for each in found:
        if each["kind"] in SCHEMAS:
            jsonschema.Draft202012Validator(SCHEMAS[each["kind"]]).validate(each)
            check_by_kubernetes(json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": each["metadata"]}))
        else:
            check_by_kubernetes(json.dumps(each))
    for _, template in pod_templates(found):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
        check_by_kubernetes(json.dumps(pod))


@cache
def check_by_kubernetes(each):
    for version in VERSIONS:
        kubernetes_validate.validate(json.loads(each), version, strict=True)


@pytest.mark.parametrize("path", PATHS)
def test_each_overlay_and_job(path):
    check(rendered(path))


@pytest.mark.parametrize("components", list(combinations()), ids="+".join)
def test_each_combination_of_components(components, tmp_path):
    check(combined(components, tmp_path))


def test_unknown_fields_are_refused():
    for each in rendered("overlays/cpu"):
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check([each | {"spce": {}}])


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_says_of_each_object_what_else_it_may_have(kind):
    def walk(schema):
        if isinstance(schema, dict):
            assert schema.get("type") != "object" or "additionalProperties" in schema, schema
        for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            walk(part)

    jsonschema.Draft202012Validator.check_schema(SCHEMAS[kind])
    walk(SCHEMAS[kind])

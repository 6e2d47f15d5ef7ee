"""deploy/ray/rayjob.yaml says nothing that the code does not know."""

import shlex
from pathlib import Path

import tyro
import yaml

from weakseg.batch.commands import Arguments

JOB = yaml.safe_load((Path(__file__).parents[3] / "deploy" / "ray" / "rayjob.yaml").read_text())


def test_its_command_is_one_of_ours():
    program, verb, *flags = shlex.split(JOB["spec"]["entrypoint"])
    assert (program, verb) == ("weakseg", "pseudo-label")
    arguments = tyro.cli(Arguments, args=flags)
    assert arguments.engine == "ray" and arguments.address is None, "KubeRay tells the driver where the cluster is"


def test_every_pod_sees_the_data_and_runs_as_nobody():
    cluster = JOB["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/data", "/models", "/tmp"]
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert {one["name"] for one in container["env"]} == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    arguments = tyro.cli(Arguments, args=shlex.split(JOB["spec"]["entrypoint"])[2:])
    assert all(path.startswith("/data/") for path in (arguments.input, arguments.output))
    assert arguments.bundle == Path("/models"), "where fetch-model puts it"

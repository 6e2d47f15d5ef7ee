"""deploy/ray/rayjob.yaml says nothing that the code does not know."""

import shlex
from importlib.metadata import requires
from pathlib import Path

import tyro
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from weakseg.batch.commands import Arguments

ROOT = Path(__file__).parents[3]
JOB = yaml.safe_load((ROOT / "deploy" / "ray" / "rayjob.yaml").read_text())


def test_its_command_is_one_of_ours():
    program, verb, *flags = shlex.split(JOB["spec"]["entrypoint"])
    assert (program, verb) == ("weakseg", "pseudo-label")
    arguments = tyro.cli(Arguments, args=flags)
    assert arguments.engine == "ray" and arguments.address is None, "KubeRay tells the driver where the cluster is"


def test_its_ray_is_that_of_the_image_and_asks_for_a_token():
    """KubeRay hands in jobs at the dashboard, and asks it how a node is: a plain ray has none."""
    cluster = JOB["spec"]["rayClusterSpec"]
    locked = (ROOT / "deploy" / "docker" / "requirements-batch.lock").read_text()
    assert f"ray=={cluster['rayVersion']} " in locked
    for one in map(Requirement, requires("ray")):
        if one.marker is not None and one.marker.evaluate({"extra": "default"}):
            assert f"\n{canonicalize_name(one.name)}==" in locked, one
    assert cluster["authOptions"] == {"mode": "token"}


def test_every_pod_sees_the_data_and_runs_as_nobody():
    cluster = JOB["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/data", "/models", "/tmp"]
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    arguments = tyro.cli(Arguments, args=shlex.split(JOB["spec"]["entrypoint"])[2:])
    assert all(path.startswith("/data/") for path in (arguments.input, arguments.output))
    assert arguments.bundle == Path("/models"), "where fetch-model puts it"

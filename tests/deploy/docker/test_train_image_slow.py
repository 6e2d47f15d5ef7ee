"""The image `train`, run as jobs/train runs it, on CPUs: torchrun with two processes, a root that is read-only.

Its packages are 3 GB to fetch, most of it CUDA, and the build wants 30 GB of disk. Needs root.
"""

import shlex
from pathlib import Path

import pytest
import yaml

from weakseg.cli import main

ROOT = Path(__file__).parents[3]
JOB = ROOT / "deploy" / "kustomize" / "jobs" / "train" / "job.yaml"
TIMEOUT_S = 1200.0
RECIPE = "synthetic --data.root=/data/scenes --backbone.weights=None --train.optim.epochs=1 --train_seg.optim.epochs=1"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image(images):
    with images.built("train") as built:
        yield built


def test_the_training_job_from_scenes_to_a_bundle(run, image, data):
    sizes = ["--n-train", "16", "--n-val", "4", "--n-tune", "4"]
    assert main(["data", "make-synthetic", str(data / "scenes"), *sizes]) == 0
    (container,) = yaml.safe_load(JOB.read_text())["spec"]["template"]["spec"]["containers"]
    args = container["args"]
    command = [*container["command"], *args[: args.index("run") + 1], *shlex.split(RECIPE)]
    mounts = {data: ("/data", "rw")}
    trained = run(image, "train", command, cwd=container["workingDir"], tmp="8g", mounts=mounts)
    assert trained.process.wait(timeout=TIMEOUT_S) == 0, trained.log.read_text()
    (report,) = (data / "runs" / "synthetic").glob("report.html")
    assert report.stat().st_size > 0
    bundle = next((data / "runs" / "synthetic").glob("bundle*/**/manifest.json")).parent
    assert main(["bundle", "verify", str(bundle)]) == 0

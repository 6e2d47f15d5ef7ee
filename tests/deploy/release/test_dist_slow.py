"""`make test-dist`: what a release uploads, in clean environments, asked to do what each extra is for.

Environments have the newest packages that the metadata allows, as users get them; those with torch have the versions of
constraints.txt, and the Python of these tests alone: for others its download is some GB. Interpreters are those of the
PATH: PATH=~/.pyenv/versions/3.12.1/bin:$PATH make test-dist
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from weakseg.local_server import local_server

ROOT = Path(__file__).parents[3]
RELEASE = ROOT / ".venv-release" / "bin"
PYTHONS = ("3.11", "3.12", "3.13")
BUNDLE = "BUNDLE"  # in commands: a copy of the toy bundle
PHOTOS = "PHOTOS"  # a folder of one image

ASK = """
import sys
from weakseg.client import Client
with Client(sys.argv[1]) as client:
    result = client.segment(sys.argv[2], outputs=("segmentation", "cam"))
assert result.mask.shape == (40, 56) and sorted(set(result.mask.ravel().tolist())) == [0, 1, 2, 3]
"""
SERVE = """
import sys
from pathlib import Path
from weakseg.client import Client
from weakseg.local_server import local_server
with local_server(Path(sys.argv[1]), Path("server.log"), *sys.argv[3:]) as ports, Client(ports.target) as client:
    assert client.segment(next(Path(sys.argv[2]).iterdir())).mask.shape == (40, 56)
    print(*client.model().refinements)
"""
QUICK = ["--data.root", "data", "--train.optim.epochs", "1", "--train.optim.workers", "0"]
# What each extra is for. `weakseg` and `python` are those of the environment.
SMOKE = {
    "": [["weakseg", "--version"], ["weakseg", "bundle", "verify", BUNDLE]],
    "serve": [["python", "-c", SERVE, BUNDLE, PHOTOS]],
    "serve,tracing": [
        ["python", "-c", "from serve.tracing import tracing_from_environment as t; t().close()"],
    ],
    "serve,refine": [
        ["python", "-c", SERVE + "    assert 'crf' in client.model().refinements\n", BUNDLE, PHOTOS],
    ],
    "sign": [
        ["weakseg", "bundle", "keygen", "key.pem"],
        ["weakseg", "bundle", "sign", "--key", "key.pem", BUNDLE],
        ["weakseg", "bundle", "verify", "--public-key", "key.pub", BUNDLE],
    ],
    "batch": [["weakseg", "pseudo-label", "--input", PHOTOS, "--output", "out", "--bundle", BUNDLE]],
    "ray": [["weakseg", "pseudo-label", "--input", PHOTOS, "--output", "out", "--bundle", BUNDLE, "--engine", "ray"]],
    "openvino": [["weakseg", "predict", PHOTOS, "--bundle", BUNDLE, "--runtime", "openvino", "--output", "out"]],
}
WITH_TORCH = {
    "train": [
        ["weakseg", "data", "make-synthetic", "data", "--n-train", "12", "--n-val", "4", "--n-tune", "4"],
        ["weakseg", "run", "synthetic", "--to", "train", *QUICK],
    ],
    "hf": [["python", "-c", "import training.models.hf, transformers"]],
    "export": [
        ["weakseg", "export", "--help"],
        ["python", "-c", "import export.commands, export.onnx_from_torch, onnxscript"],
    ],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (RELEASE / "uv").exists(), reason="needs build and uv: make .venv-release/.installed"),
]


@pytest.fixture(scope="module")
def repository():
    """Files that are or will be committed, when `dist` is built. Not links to folders: an sdist copies them."""
    listed = output(["git", "ls-files", "--cached"], cwd=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def dist(repository, tmp_path_factory):
    """A folder with sdist and wheel of the working tree, the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    output([RELEASE / "python", "-m", "build", "--outdir", folder, ROOT])
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(dist):
    (found,) = dist.glob("*.tar.gz")
    return found


@pytest.fixture
def environment(wheel, tmp_path):
    """A function that makes a clean environment of a Python with these extras; returns a function that runs in it."""

    def make(python, extras, *more, constraints=()):
        interpreter = sys.executable if python is None else found(f"python{python}")
        folder, empty = tmp_path / "environment", tmp_path / "empty"
        empty.mkdir()
        output([RELEASE / "uv", "venv", "--quiet", "--python", interpreter, folder])
        wanted = f"weakseg[{extras}] @ {wheel.as_uri()}"
        install = [RELEASE / "uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python"]
        links = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if "PIP_FIND_LINKS" in os.environ else {}
        output([*install, *constraints, wanted, *more], env=os.environ | links)

        def run(program, *arguments, cwd=empty):
            clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
            return output([folder / "bin" / program, *arguments], cwd=cwd, env=clean)

        run.folder, run.install = folder, install
        return run

    return make


@pytest.fixture(scope="module")
def photos(tmp_path_factory, colours):
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(colours).save(folder / "one.png")
    return folder


@pytest.fixture
def smoke(environment, tmp_path, toy_bundle, photos):
    """A function that runs the commands of an extra in its environment."""

    def run(python, extras, commands, **options):
        bundle = shutil.copytree(toy_bundle, tmp_path / "toy" / "1")
        there = environment(python, extras, **options)
        for command in commands:
            there(*({BUNDLE: str(bundle), PHOTOS: str(photos)}.get(word, word) for word in command))

    return run


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extras", SMOKE)
def test_an_extra_does_what_it_is_for(extras, python, smoke):
    smoke(python, extras, SMOKE[extras])


@pytest.mark.parametrize("extras", WITH_TORCH)
def test_an_extra_with_torch(extras, smoke):
    smoke(None, extras, WITH_TORCH[extras], constraints=("--constraint", str(ROOT / "constraints.txt")))


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("protobuf", [5, 6, 7])
def test_a_client_under_every_protobuf(protobuf, python, environment, toy_bundle, photos, tmp_path):
    there = environment(python, "client", f"protobuf>={protobuf},<{protobuf + 1}")
    version = there("python", "-c", "import google.protobuf as p; print(p.__version__)")
    assert version.startswith(f"{protobuf}.")
    with local_server(toy_bundle, tmp_path / "server.log", "--threads", "1") as ports:
        there("python", "-W", "error", "-c", ASK, ports.target, photos / "one.png")


def test_the_wheel_is_the_packages_and_nothing_else(repository, wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    packages = ("weakseg/", "training/", "export/", "serve/")
    assert names == {name for name in repository if name.startswith(packages)}


def test_the_sdist_is_the_repository(repository, sdist):
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert repository - names <= {".gitignore", ".gitattributes"}


def test_tests_run_from_the_sdist(sdist, tmp_path):
    with tarfile.open(sdist) as opened:
        opened.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    some = ("tests/weakseg/test_image.py", "tests/serve/test_contract.py", "tests/deploy/release/test_check.py")
    output([sys.executable, "-m", "pytest", "--quiet", *some], cwd=root)


def test_a_folder_of_ones_own_named_serve(environment, tmp_path):
    """`weakseg` is not confused by it, `python -m weakseg` says what is in the way."""
    there = environment(None, "serve")
    (tmp_path / "project" / "serve").mkdir(parents=True)
    (tmp_path / "project" / "serve" / "__init__.py").touch()
    assert "usage: weakseg serve" in there("weakseg", "serve", "--help", cwd=tmp_path / "project")
    with pytest.raises(AssertionError, match=r"another package serve at .*/project/serve: install weakseg into an env"):
        there("python", "-m", "weakseg", "serve", "--help", cwd=tmp_path / "project")


def test_another_distribution_with_a_package_of_ours(environment):
    """PyPI's `export` has a package export, too. Whoever installs last owns export/__init__.py: the other is broken."""
    there = environment(None, "")
    assert "packages_distributions" in (
        who := "import importlib.metadata as m; print(m.packages_distributions()['export'])"
    )
    assert there("python", "-c", who) == "['weakseg']"
    output([*there.install, "export==0.2.1"])
    assert there("python", "-c", who) in ("['export', 'weakseg']", "['weakseg', 'export']")
    both = "import export; print(export.__doc__)"
    ours = (ROOT / "export" / "__init__.py").read_text()
    assert there("python", "-c", both) not in ours


def found(program):
    """Its path; pyenv's stand-ins for what it has not been told to use end with an error."""
    path = shutil.which(program)
    if path is None or subprocess.run([path, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"needs {program} on the PATH")
    return path


def output(command, **options):
    """What a command prints, without the last line end; with what it said where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()

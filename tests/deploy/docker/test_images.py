"""Dockerfiles, locks and build.sh, read as text: what holds of every image without building one."""

import json
import os
import re
import shutil
import stat
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serve.settings import ServeConfig
from weakseg.cli import VERBS

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = {"Dockerfile": ("serve", "train", "batch"), "serve-gpu.Dockerfile": ("serve",)}
# As lock.sh has it: image, Python, extras, and what is left out of the lock.
LOCKED = re.findall(r"^lock (\S+) (3\.\d+) (\S+)((?: --no-emit-package \S+)*)$", (DOCKER / "lock.sh").read_text(), re.M)
IMAGES = [image for image, *_ in LOCKED]
TORCH = ("torch", "torchvision", "triton", "tensorboard")


def instructions(file):
    """Stages of a Dockerfile by name: the base, and (instruction, argument) in order; ARGs before the first are ""."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / file).read_text(), flags=re.M)
    text = re.sub(r"\\\n\s*", "", text)
    stages = {"": ("", [])}
    for line in filter(str.strip, text.splitlines()):
        word, _, argument = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = argument.partition(" AS ")
            stages[name] = (base, [])
        stages[list(stages)[-1]][1].append((word, argument))
    return stages


def chain(file, target):
    """Instructions of a stage and of those that it is made from, the last base first."""
    stages, made = instructions(file), []
    while target in stages:
        base, own = stages[target]
        made = own + made
        target = base
    return made


def lock(image):
    """{name: (version, hashes)} of a lock."""
    text = (DOCKER / f"requirements-{image}.lock").read_text()
    entries = re.findall(
        r"^([\w.\-]+)==([^\s\\;]+)(?: ; [^\\]+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M
    )
    names = [canonicalize_name(name) for name, *_ in entries]
    assert len(set(names)) == len(names) == len(re.findall(r"^\w", text, re.M)), (
        f"{image}: a line without a version or a hash"
    )
    return {name: (version, hashes.split()) for name, (_, version, hashes) in zip(names, entries, strict=True)}


def test_locks_are_those_that_are_made():
    assert sorted(f"requirements-{image}.lock" for image in IMAGES) == sorted(
        path.name for path in DOCKER.glob("*.lock")
    )


TARGETS = [(file, target) for file, targets in DOCKERFILES.items() for target in targets]


@pytest.mark.parametrize(("file", "target"), TARGETS)
def test_an_image_runs_as_nobody_in_particular_and_without_a_shell(file, target):
    last = dict(chain(file, target))  # of each instruction the last one counts
    assert last["USER"] == "10001:10001"
    assert json.loads(last["ENTRYPOINT"]) == ["weakseg"]
    verb = json.loads(last["CMD"])[0]
    assert verb in VERBS or verb == "--help"
    assert "SHELL" not in last


@pytest.mark.parametrize(("file", "target"), [one for one in TARGETS if one[1] == "serve"])
def test_ports_and_health_check_of_a_server_are_those_of_the_code(file, target):
    last = dict(chain(file, target))
    defaults = ServeConfig()
    assert last["EXPOSE"].split() == [str(defaults.port), str(defaults.metrics_port)]
    command = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert command[:2] == ["python3", "-m"] and find_spec(command[2]) is not None
    variables = set(re.findall(r"(WEAKSEG_\w+)=", last["ENV"]))
    assert variables <= {f"WEAKSEG_{name.upper()}" for name in ServeConfig.model_fields}


@pytest.mark.parametrize(("file", "target"), TARGETS)
def test_labels_say_what_it_is(file, target):
    labels = next(argument for word, argument in chain(file, target) if word == "LABEL")
    keys = set(re.findall(r"org\.opencontainers\.image\.([\w.]+)=", labels))
    assert keys == {"title", "description", "version", "revision", "source", "licenses", "base.name"}
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'licenses="{metadata["license"]}"' in labels


@pytest.mark.parametrize("file", DOCKERFILES)
def test_nothing_comes_from_elsewhere(file):
    stages = instructions(file)
    bases = {argument.partition("=")[2] for word, argument in stages[""][1] if word == "ARG"} - {"${BASE}"}
    for base in bases:  # of known release, from a named registry
        assert re.fullmatch(r"[\w.]+/[\w/.-]+:[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?", base) and "latest" not in base
    for name, (base, made) in stages.items():
        assert not name or base in ("${BASE}", "${BUILD}") or base in stages
        for word, argument in made:
            assert word != "ADD"
            assert not re.search(r"https?://|\bcurl\b|\bwget\b", argument)
            for source in re.findall(r"--from=(\S+)", argument):
                assert source in stages
            for install in re.findall(r"-m pip --python \S+ install ([^&]*)", argument):
                assert "--no-deps" in install
                assert "--require-hashes" in install or "--no-index" in install


def test_what_is_run_is_made_without_running_anything():
    """So that its base needs no shell; the GPU's base has no Python yet."""
    assert [argument for word, argument in chain("Dockerfile", "serve") if word == "RUN"] == []


@pytest.mark.parametrize(("image", "extras", "left_out"), [(image, extras, out) for image, _, extras, out in LOCKED])
def test_a_lock_covers_its_extras(image, extras, left_out):
    """All that pyproject.toml asks for by these extras, in a version that it allows, the tested one if any."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, todo = [], [*project["dependencies"]]
    for extra in extras.split(","):
        todo += project["optional-dependencies"][extra]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == "weakseg":
            for extra in requirement.extras:
                todo += project["optional-dependencies"][extra]
        else:
            needed.append(requirement)
    locked, missing = lock(image), left_out.split()[1::2]
    for requirement in needed:
        name = canonicalize_name(requirement.name)
        if name in missing:
            assert name not in locked
        else:
            assert requirement.specifier.contains(locked[name][0]), requirement
    tested = dict(re.findall(r"^([\w.\-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for name, version in tested.items():
        if canonicalize_name(name) in locked:
            assert locked[canonicalize_name(name)][0] == version, name


@pytest.mark.parametrize("image", [image for image in IMAGES if image != "train"])
def test_only_training_has_torch(image):
    assert not set(TORCH) & lock(image).keys()


def test_a_server_for_gpus_has_one_onnxruntime():
    assert {name for name in lock("serve-gpu") if name.startswith("onnxruntime")} == {"onnxruntime-gpu"}


@pytest.fixture
def builders(tmp_path):
    """A function that makes programs of these names that print their arguments; returns an environment with them."""

    def install(**exit_codes):
        for name, code in exit_codes.items():
            program = tmp_path / name
            program.write_text(f'#!/bin/bash\necho "{name} $*"\nexit {code}\n')
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        tools = tmp_path / "tools"
        tools.mkdir()
        for name in ("bash", "basename", "cut", "dirname", "git", "ls", "realpath", "wc"):
            (tools / name).symlink_to(shutil.which(name))
        return {"PATH": f"{tmp_path}:{tools}", "HOME": os.environ.get("HOME", "/")}

    return install


@pytest.fixture
def checkout(tmp_path):
    """build.sh in a folder with a wheel that was released."""
    root = tmp_path / "checkout"
    (root / "deploy" / "docker").mkdir(parents=True)
    (root / "deploy" / "docker" / "build.sh").symlink_to(DOCKER / "build.sh")
    (root / "dist").mkdir()
    (root / "dist" / "weakseg-1.2.3-py3-none-any.whl").touch()
    return root


def build(checkout, environment, *arguments):
    return subprocess.run(
        ["bash", checkout / "deploy" / "docker" / "build.sh", *arguments],
        capture_output=True, text=True, env=environment, cwd=checkout, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("image", IMAGES)
def test_every_lock_is_an_image_that_can_be_built(image, checkout, builders):
    done = build(checkout, builders(buildah=0), image)
    assert done.returncode == 0, done.stderr
    target = re.search(r"--file deploy/docker/(\S+) --target (\S+) --tag (\S+) ", done.stdout)
    assert target[2] in DOCKERFILES[target[1]]
    assert target[3] == f"weakseg/{image}:1.2.3"
    assert f"NAME={image}" in done.stdout and "--format docker" in done.stdout


def test_the_first_builder_that_works_is_taken(checkout, builders):
    """A client of docker without its daemon does not."""
    assert build(checkout, builders(docker=1, podman=0, buildah=0), "train").stdout.startswith("podman build ")


@pytest.mark.parametrize(
    ("arguments", "programs", "more", "message"),
    [
        ([], {"buildah": 0}, {}, "expected NAME=serve-cpu, .*, got ''"),
        (["serve"], {"buildah": 0}, {}, "expected NAME=serve-cpu, .*, got 'serve'"),
        (["train"], {"docker": 1}, {}, "found neither a docker that reaches its daemon, nor podman, nor buildah"),
        (["train"], {"docker": 0}, {"WHEELS": "/"}, "docker mounts no folder while it builds: unset WHEELS"),
    ],
)
def test_what_cannot_be_built_says_why(arguments, programs, more, message, checkout, builders):
    done = build(checkout, builders(**programs) | more, *arguments)
    assert done.returncode == 2
    assert re.match(f"image: {message}", done.stderr)


def test_without_a_wheel_it_says_what_makes_one(checkout, builders):
    (checkout / "dist" / "weakseg-1.2.3-py3-none-any.whl").unlink()
    done = build(checkout, builders(buildah=0), "train")
    assert (done.returncode, done.stderr) == (2, "image: expected one wheel in dist/, got 0: run make dist\n")


@pytest.fixture
def uv():
    found = ROOT / ".venv-release" / "bin" / "uv"
    if not found.exists():
        pytest.skip("needs uv: make .venv-release/.installed")
    return found


@pytest.mark.slow  # it asks the package index
@pytest.mark.parametrize(("image", "python"), [(image, python) for image, python, *_ in LOCKED])
def test_a_lock_can_be_installed(image, python, uv, tmp_path):
    """As the Dockerfile does it, up to the download: there is a wheel of everything, with one of the hashes."""
    command = [uv, "pip", "install", "--dry-run", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", "--target", tmp_path]
    done = subprocess.run(
        [*command, "--requirement", DOCKER / f"requirements-{image}.lock"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ \+ ", done.stderr, re.M)) == len(lock(image))


@pytest.mark.slow  # the same
def test_make_lock_would_change_nothing(uv, tmp_path):
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    copy = tmp_path / "deploy" / "docker"
    copy.mkdir(parents=True)
    for path in DOCKER.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    subprocess.run(["bash", copy / "lock.sh", uv], check=True, capture_output=True)
    for image in IMAGES:
        name = f"requirements-{image}.lock"
        assert (copy / name).read_text() == (DOCKER / name).read_text(), f"{name} is stale: make lock"

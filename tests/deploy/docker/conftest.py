"""Images built by buildah on a Debian from debootstrap, and what a cluster tells runc about them. Needs root."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy" / "docker"
TOOLS = ("buildah", "runc", "debootstrap")


class Images:
    """Builds images from the locks, in a storage of its own below `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.storage = ["--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]
        self.version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        self.base = "localhost/base:bookworm"

    def buildah(self, *args):
        return output(["buildah", *self.storage, *map(str, args)])

    def make_base(self):
        """Debian with its Python, and nothing else."""
        root = self.folder / "debian"
        packages = "python3,python3-venv,ca-certificates"
        output(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)])
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, root, "/")
        self.buildah("commit", "--quiet", "--rm", container, self.base)
        shutil.rmtree(root)

    def wheels(self, name):
        """A folder with the packages of a lock, for the Python of the base: 3.11."""
        folder = self.folder / f"wheels-{name}"
        if not folder.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            options = ["--python-version", "3.11", "--only-binary", ":all:", "--require-hashes"]
            lock = str(DOCKER / f"requirements-{name}.lock")
            output([*pip, *options, "--dest", str(folder), "--requirement", lock])
        return folder

    @contextmanager
    def built(self, name, wheels_of=None):
        """The image, from the wheels of its lock or of another that has them all: name, version, config, `root`."""
        builder = {
            "BUILDER": "buildah",
            "BASE": self.base,
            "WHEELS": str(self.wheels(wheels_of or name)),
            "STORAGE": " ".join(self.storage),
            "OPTIONS": "--isolation chroot --quiet",
            "SOURCE": "https://example.org/src",
        }
        output(["make", "--no-print-directory", "image", f"NAME={name}"], cwd=ROOT, env={**os.environ, **builder})
        container = self.buildah("from", f"localhost/weakseg/{name}:{self.version}")
        config = json.loads(self.buildah("inspect", "--type", "container", container))["Docker"]["config"]
        root = Path(self.buildah("mount", container))
        yield SimpleNamespace(name=name, version=self.version, config=config, root=root)
        self.buildah("umount", container)
        self.buildah("rm", container)

    def close(self):
        self.buildah("umount", "--all")
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("needs root: debootstrap and mounts")
    if not all(map(shutil.which, TOOLS)):
        pytest.skip(f"needs {', '.join(TOOLS)}: apt-get install {' '.join(TOOLS)}")
    made = Images(tmp_path_factory.mktemp("images"))
    made.make_base()
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder that user 10001 may write to."""
    folder = tmp_path_factory.mktemp("data")
    folder.chmod(0o777)
    return folder


@pytest.fixture
def run(tmp_path):
    """`running`, to the end of the test, in a folder of its own."""
    with ExitStack() as stack:

        def run(image, name, args, **options):
            (tmp_path / name).mkdir()
            return stack.enter_context(running(image, tmp_path / name, args=args, **options))

        yield run


@contextmanager
def running(image, folder, **options):
    """A container of the image; options are those of `specification`. Its id, process and log; it goes in the end."""
    hosts = folder / "hosts"  # Kubernetes and Docker write one, images have none
    hosts.write_text("127.0.0.1 localhost\n")
    (folder / "config.json").write_text(json.dumps(specification(image, hosts, **options)))
    id_, log = f"weakseg-{os.getpid()}-{image.name}-{folder.name}", folder / "log.txt"
    with open(log, "w") as opened:
        process = subprocess.Popen(["runc", "run", "--bundle", str(folder), id_], stdout=opened, stderr=opened)
    try:
        yield SimpleNamespace(id=id_, process=process, log=log)
    finally:
        subprocess.run(["runc", "delete", "--force", id_], capture_output=True, check=False)
        process.wait()


def specification(
    image, hosts, *, args=None, cwd=None, environment=(), mounts=None, read_only=True, tmp="64m", network=None
):
    """A config of an OCI runtime, as Kubernetes makes it.

    args, cwd: instead of those of the image. mounts: {folder here: (folder inside, "ro" or "rw")}. read_only: whether
    its root is, beside the emptyDir of size `tmp` at /tmp. network: a namespace by its path; else the host's.
    """
    strict = ["nosuid", "nodev"]
    everybodys = ["mode=1777", *strict]
    namespaces = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]
    if network:
        namespaces.append({"type": "network", "path": network})
    bound = [
        {"destination": inside, "type": "bind", "source": str(here), "options": ["bind", mode, *strict]}
        for here, (inside, mode) in {hosts: ("/etc/hosts", "ro"), **(mounts or {})}.items()
    ]
    return {
        "ociVersion": "1.0.0",
        "process": {
            "user": dict(zip(("uid", "gid"), map(int, image.config["User"].split(":")), strict=True)),
            "args": args or image.config["Entrypoint"] + image.config["Cmd"],
            "env": [*image.config["Env"], *environment],
            "cwd": cwd or image.config["WorkingDir"],
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "root": {"path": str(image.root), "readonly": read_only},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=1m"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": everybodys},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": [*everybodys, f"size={tmp}"]},
            *bound,
        ],
        "linux": {"namespaces": namespaces},
    }


def output(command, **options):
    """What a command prints, without the last line end; with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()

"""Images built by buildah on a Debian from debootstrap, and what a cluster tells runc about them. Needs root."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
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

    def build(self, name, wheels_of=None):
        """A container of the image, from the wheels of its lock or of another that has them all.

        Returns: its name, version, config, container and files below `root`.
        """
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
        return SimpleNamespace(name=name, version=self.version, config=config, container=container, root=root)

    def remove(self, image):
        self.buildah("umount", image.container)
        self.buildah("rm", image.container)

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


@pytest.fixture(scope="session")
def specification(tmp_path_factory):
    """A function: an image to the config of an OCI runtime, as Kubernetes makes it.

    args, cwd: instead of those of the image. mounts: {folder here: (folder inside, "ro" or "rw")}.
    read_only: whether its root is, beside the emptyDir at /tmp. network: a namespace by its path; the host's.
    """

    hosts = tmp_path_factory.mktemp("etc") / "hosts"  # Kubernetes and Docker write one, images have none
    hosts.write_text("127.0.0.1 localhost\n")

    def specification(image, *, args=None, cwd=None, environment=(), mounts=None, read_only=True, network=None):
        strict = ["nosuid", "nodev"]
        tmpfs = ["mode=1777", *strict]
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
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": tmpfs},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": tmpfs},
                *bound,
            ],
            "linux": {"namespaces": namespaces},
        }

    return specification


@pytest.fixture
def run(specification, tmp_path):
    """A function that starts a container of an image with a name, `args` and what `specification` takes.

    Returns: its id, process and log. All of them go in the end.
    """
    started = []

    def run(image, name, args, **options):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(specification(image, args=args, **options)))
        id_, log = f"weakseg-{image.name}-{os.getpid()}-{name}", folder / "log.txt"
        with open(log, "w") as opened:
            process = subprocess.Popen(["runc", "run", "--bundle", str(folder), id_], stdout=opened, stderr=opened)
        started.append(SimpleNamespace(id=id_, log=log, process=process))
        return started[-1]

    yield run
    for one in started:
        subprocess.run(["runc", "delete", "--force", one.id], capture_output=True, check=False)
        one.process.wait()


def output(command, **options):
    """What a command prints, without the last line end; with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()

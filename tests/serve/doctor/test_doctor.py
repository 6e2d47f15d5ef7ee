"""`weakseg doctor`, with what it is for: ports that are in use, bundles with a fault, limits of containers."""

import datetime
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from serve.doctor import host, models, network
from serve.settings import ServeConfig
from weakseg import cpu, signature
from weakseg.bundle import SIGNATURE
from weakseg.cli import main


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in [name for name in os.environ if name.startswith("WEAKSEG_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def bundle(toy_bundle, tmp_path):
    """A copy of the toy bundle, to be spoilt."""
    return shutil.copytree(toy_bundle, tmp_path / "models" / "toy" / "1")


@pytest.fixture
def tree(tmp_path):
    """A function: files of /proc and /sys to a root that has them."""

    def make(**files):
        names = {"cgroup": "proc/self/cgroup", "meminfo": "proc/meminfo", "cpu_max": "sys/fs/cgroup/cpu.max"}
        names |= {"memory_max": "sys/fs/cgroup/memory.max"}
        for name, text in {"cgroup": "0::/\n", **files}.items():
            path = tmp_path / "root" / names[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "root"

    return make


def checked(capsys, *flags):
    """{check: its finding}, and the exit code."""
    code = main(["doctor", "--json", "--port", "0", "--metrics-port", "0", *flags])
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] == (code == 0)
    assert all(bool(one["todo"]) == (one["status"] != "ok") for one in said["checks"]), "what to do, where there is"
    return {one["check"]: one for one in said["checks"]}, code


def test_a_machine_that_is_fit(capsys, bundle):
    found, code = checked(capsys, "--bundle", str(bundle))
    assert code == 0
    assert found["model toy/1"]["found"] == "verified, no signature; 3 graphs ran on CPUExecutionProvider"
    assert "onnxruntime" in found["packages"]["found"] and "CPUExecutionProvider" in found["runtime"]["found"]
    assert {one["status"] for one in found.values()} <= {"ok", "warning"}


def test_as_text_each_has_a_line_and_what_to_do_one_below(capsys):
    assert main(["doctor", "--port", "0", "--metrics-port", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAILED   models"))
    assert "no bundle to serve: pass --bundle" in lines[at] and lines[at + 1].strip().startswith("→ docs/bundle.md")
    assert lines[-1].endswith(", 1 failed")


def test_settings_that_are_not_understood_are_one_finding_and_the_rest_goes_on(capsys, bundle, monkeypatch):
    monkeypatch.setenv("WEAKSEG_MAX_BACH", "4")
    found, code = checked(capsys, "--bundle", str(bundle))
    assert code == 1
    assert found["settings"]["found"] == (
        "unknown environment variable WEAKSEG_MAX_BACH: did you mean WEAKSEG_MAX_BATCH?"
    )
    assert found["model toy/1"]["status"] == "ok"


def test_a_wrong_flag_is_an_error_of_usage(capsys):
    assert main(["doctor", "--tls-client-ca", "ca.crt"]) == 2
    assert "tls_client_ca needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "text"), [("grpc", "raise RuntimeError('grpcio is too old')"), ("pydantic", "raise ImportError('gone')")]
)
def test_packages_that_cannot_be_imported(tmp_path, module, text):
    (tmp_path / f"{module}.py").write_text(text)
    code = "import sys; from weakseg.cli import main; sys.exit(main(['doctor', '--json']))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    (only,) = json.loads(done.stdout)["checks"]
    assert done.returncode == 1 and only["check"] == "packages" and text.split("'")[1] in only["found"]


@pytest.mark.parametrize(
    ("quota", "threads", "status", "said"),
    [
        ("max 100000", None, "ok", "no quota: 4 usable"),
        ("200000 100000", None, "ok", "a quota of 2: 2 usable"),
        ("200000 100000", 8, "warning", "threads is 8"),
        ("50000 100000", None, "warning", "a quota of 0.5: 1 usable; 1 threads stand still for 50 % of the time"),
        ("250000 100000", None, "warning", "a quota of 2.5: 3 usable; 3 threads stand still for 17 % of the time"),
        ("950000 100000", None, "ok", "a quota of 9.5: 4 usable"),
    ],
)
def test_cores_against_the_quota(tree, monkeypatch, quota, threads, status, said):
    monkeypatch.setattr(cpu, "affinity", lambda: 4)
    monkeypatch.setattr(host, "affinity", lambda: 4)
    found = host.cores(ServeConfig(threads=threads), tree(cpu_max=quota))
    assert found.status == status and said in found.found


def test_memory_against_the_limit(tree, monkeypatch):
    monkeypatch.setattr(host, "_resident_mib", lambda: 400)
    config = ServeConfig(image_memory_mib=1000)
    for limit_mib, status, todo in (
        (4000, "ok", ""),
        (3400, "ok", ""),
        (3399, "warning", "give 3400 MiB, or set image_memory_mib to 999"),
        (1400, "warning", "give 3400 MiB, or set image_memory_mib to 333"),
        (1399, "failed", "give 3400 MiB, or set image_memory_mib to 333"),
        (300, "failed", "give 3400 MiB, or serve fewer models"),
    ):
        found = host.memory(config, tree(memory_max=str(limit_mib * 2**20)))
        assert (found.status, found.todo) == (status, todo)
    assert host.memory(ServeConfig(image_memory_mib=333), tree(memory_max=str(1400 * 2**20))).status == "ok"


def test_what_is_taken_is_that_of_this_process():
    taken_mib = host._resident_mib()
    ballast = b"x" * 2**28
    assert host._resident_mib() >= taken_mib and host._resident_mib() > len(ballast) / 2**20


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv(host.NUMBA_VARIABLE, str(tmp_path / "absent"))
    found = {one.check: one for one in host.folders(ServeConfig(runtime="tensorrt"))}
    assert found["temporary files"].status == "ok"
    assert (
        found["kernels of the CRF"].status == "failed" and str(tmp_path / "absent") in found["kernels of the CRF"].found
    )
    monkeypatch.setenv("WEAKSEG_ENGINE_CACHE", str(tmp_path))
    assert {one.check: one for one in host.folders(ServeConfig(runtime="tensorrt"))}["engines"].status == "ok"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_full_disk_shows_itself(monkeypatch):
    monkeypatch.setattr(host.tempfile, "TemporaryFile", lambda **_: io.FileIO("/dev/full", "w"))
    found = next(iter(host.folders(ServeConfig())))
    assert found.status == "failed" and "No space left" in found.found


class _At(BaseHTTPRequestHandler):
    date = datetime.datetime.now(datetime.UTC)

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def date_time_string(self, timestamp=None):
        return self.date.strftime("%a, %d %b %Y %H:%M:%S GMT")

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("behind_s", "status", "said"),
    [(0, "ok", "http"), (30, "warning", "ahead of"), (3600, "failed", "ahead of"), (-3600, "failed", "behind")],
)
def test_the_clock_against_a_server(behind_s, status, said):
    shown = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=behind_s)
    with HTTPServer(("127.0.0.1", 0), type("At", (_At,), {"date": shown})) as server:
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        found = host.clock(f"http://127.0.0.1:{server.server_port}/livez")
        answering.join()
    assert found.status == status and said in found.found


def test_the_clock_against_nobody(capsys, bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found, code = checked(capsys, "--bundle", str(bundle), "--clock", f"http://127.0.0.1:{port}/")
    assert code == 0 and found["clock"]["status"] == "warning"


def test_a_port_that_is_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (found, _) = network.ports(ServeConfig(host="127.0.0.1", port=port, metrics_port=0))
    assert found.status == "failed" and "in use" in found.found and "--port" in found.todo


def test_ports_of_a_server_that_runs_are_its_own(shared_serving):
    server = shared_serving.server
    config = ServeConfig(host="127.0.0.1", port=server.port, metrics_port=server.metrics_port)
    assert [one.status for one in network.ports(config)] == ["warning", "warning"]


def test_two_settings_with_one_port_and_an_address_of_another_machine():
    found = list(network.ports(ServeConfig(port=7000, metrics_port=7000)))
    assert [one.found for one in found] == ["2 settings name it", "2 settings name it"]
    found = next(iter(network.ports(ServeConfig(host="192.0.2.1", port=7000))))
    assert found.status == "failed" and "name an address of this machine" in found.todo


def test_bundles_with_a_fault(capsys, bundle):
    graph = bundle / "segmentation.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    found, code = checked(capsys, "--models", str(bundle.parents[1]))
    assert code == 1 and "segmentation.onnx" in found["model toy/1"]["found"]
    assert f"weakseg bundle verify {bundle}" in found["model toy/1"]["todo"]


def test_signatures(capsys, bundle, tmp_path):
    pytest.importorskip("cryptography", reason="pip install 'weakseg[sign]'")
    public, fingerprint = signature.keygen(tmp_path / "key.pem")
    flags = ("--bundle", str(bundle), "--public-key", str(public))
    found, code = checked(capsys, *flags)
    assert code == 1 and "sign" in found["model toy/1"]["found"]
    (bundle / SIGNATURE).write_bytes(signature.sign((bundle / "manifest.json").read_bytes(), tmp_path / "key.pem"))
    found, code = checked(capsys, *flags)
    assert code == 0 and f"signed by {fingerprint[:16]}" in found["model toy/1"]["found"]
    found, _ = checked(capsys, "--bundle", str(bundle))
    assert "a signature that no public_key checks" in found["model toy/1"]["found"]


def test_labels_of_versions_that_are_not_there(capsys, bundle):
    (bundle.parent / "labels.toml").write_text('stable = "1"\ncanary = "2"\n')
    found, code = checked(capsys, "--models", str(bundle.parents[1]))
    assert code == 1 and found["label toy/canary"]["found"] == "the label names version 2, there is 1"


def test_a_provider_that_is_not_there(capsys, bundle):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this one has CUDA")
    found, code = checked(capsys, "--bundle", str(bundle), "--provider", "cuda")
    assert code == 1
    assert {found[name]["status"] for name in ("runtime", "model toy/1")} == {"failed"}
    assert "weakseg[gpu]" in found["runtime"]["todo"]


@pytest.mark.parametrize(
    ("driver", "settings", "status", "said"),
    [
        ((0, 0), {}, "ok", "none is asked for"),
        ((0, 0), {"provider": "cuda"}, "failed", "no NVIDIA driver"),
        ((0, 13000), {"runtime": "tensorrt"}, "failed", "but no GPU; asked for by runtime tensorrt"),
        ((1, 12080), {"provider": "cuda"}, "ok", "CUDA 12.8"),
        ((1, 12080), {}, "warning", "networks run on the CPU"),
    ],
)
def test_gpus_that_are_wanted_or_idle(monkeypatch, driver, settings, status, said):
    monkeypatch.setattr(models, "_cuda_driver", lambda: driver)  # there is none here
    found = models.gpu(ServeConfig(**settings))
    assert found.status == status and said in found.found


def test_both_onnxruntimes_at_once(tmp_path, monkeypatch):
    gpu = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    gpu.mkdir()
    (gpu / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = models.runtime(ServeConfig())
    assert found.status == "failed" and "both installed" in found.found


def test_tokens(tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text('[tool]\ntoken = "0123456789abcdef"\n')
    path.chmod(0o600)
    config = ServeConfig(tokens=path, host="127.0.0.1")
    assert network.tokens(config).status == "ok"
    path.chmod(0o644)
    found = network.tokens(config)
    assert found.status == "warning" and "0123456789abcdef" not in found.found
    path.write_text("[tool]\ntoken = 'short'\n")
    assert network.tokens(config).status == "failed"

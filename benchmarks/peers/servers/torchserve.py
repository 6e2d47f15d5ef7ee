"""TorchServe: an archive with torchserve_handler.py, workers and batches as config.properties has them; needs Java."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.processes import free_port
from benchmarks.peers.servers.setting import BATCH, DELAY_S, PORT, QUEUE, WORKERS

LOG = """\
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %p %c %m%n
rootLogger = warn, console
"""
HANDLER = Path(__file__).with_name("torchserve_handler.py")
COMMANDS = Path(sys.executable).parent


def main() -> None:
    archiver = [str(COMMANDS / "torch-model-archiver"), "--model-name", "model", "--version", "1.0"]
    subprocess.run([*archiver, "--handler", str(HANDLER), "--export-path", "."], check=True)
    model = {
        "defaultVersion": True,
        "marName": "model.mar",
        "minWorkers": WORKERS,
        "maxWorkers": WORKERS,
        "batchSize": BATCH,
        "maxBatchDelay": round(1000 * DELAY_S) if BATCH > 1 else 0,
        "responseTimeout": 120,
    }
    properties = {f"{api}_address": f"http://127.0.0.1:{free_port()}" for api in ("inference", "management", "metrics")}
    properties |= {
        "grpc_inference_address": "127.0.0.1",
        "grpc_inference_port": PORT,
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": free_port(),
        "job_queue_size": QUEUE,
        "disable_token_authorization": "true",
        "metrics_mode": "prometheus",  # else they are lines of the log
        "model_store": ".",
        "load_models": "model.mar",
        "models": json.dumps({"model": {"1.0": model}}),
    }
    Path("config.properties").write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
    Path("log4j2.properties").write_text(LOG)
    # TorchServe keeps its pid and its workers' sockets in the temporary folder, one server in each.
    os.environ |= {"TMPDIR": str(Path.cwd()), "TEMP": str(Path.cwd())}
    command = [str(COMMANDS / "torchserve"), "--start", "--foreground", "--no-config-snapshots"]
    os.execv(command[0], [*command, "--ts-config", "config.properties", "--log-config", "log4j2.properties"])


if __name__ == "__main__":
    main()

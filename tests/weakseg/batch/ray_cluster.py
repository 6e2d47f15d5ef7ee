"""Run by tests in a process of its own: the job on a Ray cluster of two nodes, one of which is killed.

    python tests/weakseg/batch/ray_cluster.py INPUT OUTPUT BUNDLE N

Prints the job's JSON. The second node dies, without a word, once N masks are there.
"""

import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from weakseg.cli import main


def lose_a_node(cluster: Cluster, node: object, output: Path, n: int) -> None:
    while sum(1 for _ in output.glob("masks/**/*.png")) < n:
        time.sleep(0.01)
    cluster.remove_node(node, allow_graceful=False)
    print("a node is gone", file=sys.stderr, flush=True)


if __name__ == "__main__":
    source, output, bundle, n = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    killing = threading.Thread(target=lose_a_node, args=(cluster, second, Path(output), int(n)), daemon=True)
    killing.start()
    argv = ["pseudo-label", "--input", source, "--output", output, "--bundle", bundle, "--json"]
    code = main([*argv, "--engine", "ray", "--address", cluster.address, "--workers", "2"])
    killing.join(60)
    cluster.shutdown()
    sys.exit(code if not killing.is_alive() else 70)

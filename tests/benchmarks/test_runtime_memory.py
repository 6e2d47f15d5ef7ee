from pathlib import Path

import pytest

from benchmarks.runtime_memory import measured_alone
from weakseg.bundle import open_bundle

GRAPHS = open_bundle(Path(__file__).parents[1] / "data" / "bundles" / "toy").graph_paths()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_sizes_of_images_do_not_pile_up():
    """200 sizes: what is kept for each would be 200 times an image of 513 x 513 with its maps, several hundred MiB."""
    peak, growth = measured_alone("onnxruntime", "segmentation", GRAPHS["segmentation"])
    assert growth < 64
    assert growth <= peak

from pathlib import Path

import pytest

from benchmarks.coco_reader import by_json, by_pycocotools, by_weakseg, make, measure, measured_alone
from weakseg.recipe import DataConfig


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_every_way_reads_the_same_tags(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make(tmp_path / "set", 60)
    config = DataConfig(root=str(tmp_path / "set"), format="coco", val="train")
    by_hand, by_library = [*by_json(config)], [*by_pycocotools(config)]
    cold = measured_alone(by_weakseg, config)
    assert len(list((tmp_path / "cache/weakseg/coco").iterdir())) == 1
    warm = measure(by_weakseg, config)
    assert [*by_weakseg(config)] == by_hand == by_library
    assert cold.n_tags == warm.n_tags == sum(len(sample.tags) for sample in by_hand) > 60
    assert 0 < cold.ready_s <= cold.seconds

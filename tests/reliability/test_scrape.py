"""R18: what a scrape of the metrics takes while the server has all that it can do."""

import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import numpy as np
import pytest

from benchmarks.load import closed_loop, segment_request

LONG_S = 60.0


def scrape_under_load(server, request, seconds):
    """Seconds of each scrape, while 16 callers ask."""
    took = []
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(closed_loop, server.target, request, callers=16, seconds=seconds)
        while not load.done():
            began = time.monotonic()
            with urlopen(server.metrics_url, timeout=LONG_S) as answer:
                assert b"weakseg_inflight" in answer.read()
            took.append(time.monotonic() - began)
            time.sleep(0.1)
    assert set(load.result().codes) == {"OK"}
    return took


def test_r18_scrapes_and_requests_are_answered_side_by_side(watched, png, colours):
    assert scrape_under_load(watched, segment_request(png(colours)), seconds=1.0)


@pytest.mark.reliability
def test_r18_a_scrape_under_load_takes_no_time(watched, png, colours):
    took = scrape_under_load(watched, segment_request(png(colours)), seconds=20.0)
    print(f"{len(took)} scrapes: median {np.median(took) * 1e3:.1f} ms, longest {max(took) * 1e3:.1f} ms")
    assert np.median(took) < 0.05

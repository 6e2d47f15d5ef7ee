"""What the rounds of `make bench-peers` come to."""

import json
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from benchmarks.peers.charts import Chart, Curve, svg
from benchmarks.peers.pairs import rivals
from benchmarks.peers.peers import PEERS
from benchmarks.peers.report import failed, fastest, medians, report, results, table

ABOUT = {"idle_mib": 100, "start_to_ready_s": 1.0, "install_mib": 300, "bare_rate": 50}


def measured(peer, setting="workers", factor=1.0, loads=()):
    closed = {
        str(n): {"rate": 10 * factor * n**0.5, "p50_s": 0.1 * n, "p99_s": 0.2 * n, "codes": {"OK": 5}, "cpu_us": 900.0}
        for n in (1, 16)
    }
    opened = {str(times): {"rate": 30 * factor, "p50_s": 0.1, "p99_s": 0.3, "codes": {"OK": 5}} for times in loads}
    about = {"peer": peer, "api": PEERS[peer].api, "setting": setting, "versions": {PEERS[peer].package: "1.2"}}
    return about | ABOUT | {"closed": closed, "open": opened}


def write(folder, model, turn, result):
    file = folder / model / f"round-{turn}" / f"{result['peer']}-{result['setting']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))


def test_medians_are_of_the_numbers_that_there_are():
    assert medians([{"a": 1, "b": {"c": 5.0}, "d": "x"}, {"a": 3, "d": "y"}, {"a": 2, "b": {"c": 7.0}, "d": "z"}]) == {
        "a": 2,
        "b": {"c": 6.0},
        "d": "z",
    }


def test_the_fastest_setting_counts(tmp_path):
    for setting, rates in {"workers": (1, 9, 2), "threads": (3, 3, 3)}.items():
        for turn, factor in enumerate(rates):
            write(tmp_path, "network", turn, measured("triton", setting, factor))
    found = results(tmp_path / "network")
    assert {result["setting"]: result["closed"]["16"]["rate"] for result in found} == {"workers": 80, "threads": 120}
    assert fastest(found, 16)["triton"]["setting"] == "threads"
    assert fastest(found, 64) == {}


def test_pairs_are_of_all_at_16_callers_and_of_the_closest_at_others():
    found = [measured("weakseg", factor=9), measured("echo_grpc", factor=99), measured("litserve", "threads", 2)]
    found += [measured("kserve", factor=3), measured("mlserver", factor=2), measured("litserve", "workers", 1)]
    assert rivals(found, [1, 16]) == {
        ("kserve", "workers"): [1, 16],
        ("mlserver", "workers"): [16],
        ("litserve", "threads"): [1, 16],
    }


def lines(capsys):
    out = capsys.readouterr().out
    found = [json.loads(row) for row in out.splitlines() if row.startswith("{")]
    return {row["name"]: row for row in found}, out


def test_ours_against_the_best_of_the_others(tmp_path, capsys):
    write(tmp_path, "network", 0, measured("weakseg", factor=1.2, loads=(1, 4)))
    write(tmp_path, "network", 0, measured("litserve", factor=1.5, loads=(1, 4)))
    write(tmp_path, "network", 0, measured("ray") | {"bare_rate": 60})
    write(tmp_path, "network", 0, measured("echo_grpc", factor=100.0))
    for peer, factor in {"weakseg": 1.2, "litserve": 1.5, "ray": 0.6, "echo_http": 100.0}.items():
        write(tmp_path, "noop", 0, measured(peer, factor=factor))
    report(tmp_path, tmp_path / "images")
    found, out = lines(capsys)
    assert found["serving.vs_best_peer.c16"]["ratio"] == 0.8 and found["serving.vs_best_peer.c16"]["goal"] == 1.0
    assert found["serving.vs_peer.ray.c1"]["ratio"] == 1.2
    assert found["serving.vs_bare.c16"]["ratio"] == 0.96
    assert "bare loop, network: 50 images/s, 50 to 60 at 4 starts" in out
    assert found["serving.goodput_4x_vs_best_peer"]["ours"] == 36
    assert found["serving.install_vs_best_peer"]["ratio"] == 1
    assert found["serving.path_vs_best_peer.noop.grpc"]["ratio"] == 2
    assert found["serving.path_vs_best_peer.noop.http"]["ratio"] == 0.8
    assert found["serving.callers.noop.echo_http"]["ours"] == 4000
    assert "serving.path_vs_best_peer.small.grpc" not in found and not any("echo" in n and "vs" in n for n in found)
    row = "litserve | 1.2 | HTTP | workers | 15.0 | 60.0 | 1.20 | 1600 | 3200 | 45.0 | 45.0 |  | 900 | 100 | 1.0 | 300"
    assert f"| {row} |" in out
    pictures = sorted(file.name for file in (tmp_path / "images").iterdir())
    assert pictures == ["bench-peers-goodput.svg", "bench-peers-p99.svg", "bench-peers-throughput.svg"]


@pytest.mark.parametrize("peers", [(), ("weakseg",), ("ray", "litserve")])
def test_a_part_of_the_servers_is_reported_as_far_as_it_goes(peers, tmp_path, capsys):
    for peer in peers:
        write(tmp_path, "network", 0, measured(peer))
    report(tmp_path, tmp_path / "images")
    found, out = lines(capsys)
    assert not any("best" in name for name in found)
    assert all(f"| {peer} |" in out for peer in peers)


def test_charts_are_well_formed_and_names_apart():
    curves = [
        Curve("ours & more", [1.0, 2.0]),
        Curve("b", [None, 2.0]),
        Curve("c", [0.0, 2.0]),
        Curve("none", [None, None]),
    ]
    for log in (False, True):
        root = ElementTree.fromstring(svg([Chart("a < b", "callers", "p99, s", ["1", "4"], curves, log)] * 2))
        texts = {text.text: float(text.get("y")) for text in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"a < b", "ours & more"} <= set(texts) and "none" not in texts
        ends = sorted(texts[name] for name in ("ours & more", "b", "c"))
        assert ends[1] - ends[0] >= 12 and ends[2] - ends[1] >= 12
        numbers = [
            float(v)
            for line in root.iter("{http://www.w3.org/2000/svg}polyline")
            for p in line.get("points").split()
            for v in p.split(",")
        ]
        assert all(0 <= value <= 380 for value in numbers)


def test_names_of_curves_that_end_low_stay_above_the_axis():
    curves = [Curve(f"name {i}", [1.0, 0.1 * (i > 6)]) for i in range(8)]
    root = ElementTree.fromstring(svg([Chart("a", "load", "images/s", ["1x", "4x"], curves, False)]))
    texts = {text.text: float(text.get("y")) for text in root.iter("{http://www.w3.org/2000/svg}text")}
    ys = sorted(y for text, y in texts.items() if text.startswith("name"))
    assert ys[-1] < texts["4x"] - 6 and all(b - a >= 12 for a, b in pairwise(ys))


def test_a_table_without_open_loops():
    assert table([measured("weakseg")]).splitlines()[0].count("|") == 15


def test_calls_that_failed_are_told():
    result = measured("ray")
    assert failed(result) == ""
    result["closed"]["16"]["codes"] = {"OK": 13, "HTTP 500": 2}
    assert failed(result) == "10 %"

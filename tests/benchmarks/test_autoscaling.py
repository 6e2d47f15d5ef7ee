"""The simulation against queueing theory, and deploy's own numbers against the objectives."""

import json
import random
import re
from statistics import fmean
from xml.etree import ElementTree

import pytest
import yaml

from benchmarks.autoscaling import (
    GOALS,
    MANIFEST,
    ROOT,
    SETTINGS,
    Cluster,
    Load,
    Pod,
    Server,
    age_from_settings,
    loads,
    main,
    server_from_lines,
    settings_number,
    simulate,
    sizing,
)
from benchmarks.hpa import Hpa, Rules, hpa_from_manifest
from serve.settings import ServeConfig

FIXED = Hpa(1, 1, {"weakseg_inflight": 1.0})


def test_a_pod_serves_as_many_at_once_as_it_has_cores():
    pod = Pod(Server(cores=2, alone=20.0, busy=20.0, queue=3), ready=0.0)
    assert pod.take(0.0) == (0.0, 0.05), "alone: all cores"
    assert pod.take(0.0) == (0.0, 0.1), "beside another: one"
    assert pod.take(0.0) == (0.05, 0.05 + 0.1)
    assert pod.take(0.0) is None
    assert pod.take(0.06) is not None, "one has left"


def test_one_core_waits_as_long_as_queueing_theory_says():
    """M/D/1: the mean wait is s rho / (2 (1 - rho)), and the gauges' means follow by Little's law."""
    rate, service_s = 8.0, 0.1
    rho, draw = rate * service_s, random.Random(1)
    pod, now, waits, inside = Pod(Server(1, 10.0, 10.0, queue=10**6), 0.0), 0.0, [], []
    for i in range(200_000):
        now += draw.expovariate(rate)
        begins, _ = pod.take(now)
        waits.append(begins - now)
        if i % 50 == 0:
            pod.scrape(now)
            inside.append(pod.values()["weakseg_inflight"])
    wait_s = service_s * rho / (2 * (1 - rho))
    assert fmean(waits) == pytest.approx(wait_s, rel=0.05)
    assert fmean(inside) == pytest.approx(rate * (wait_s + service_s) + 1, rel=0.1), "and the one that has just come"


def test_too_much_for_one_pod_is_refused():
    outcome = simulate(FIXED, Cluster(), lambda _: 60.0, 60.0, 300)
    assert outcome.failed / outcome.n == pytest.approx(1 - 21.8 / 60, abs=0.08)
    assert not outcome.kept


def test_our_numbers_keep_the_objectives():
    hpa, cluster = hpa_from_manifest(MANIFEST), Cluster(age_s=age_from_settings(SETTINGS))
    steady, day, spike = loads(60.0)
    for load in (steady, Load("morning", 4 * 3600, day.most, lambda s: day.at(s + 4 * 3600))):
        outcome = simulate(hpa, cluster, load.at, load.most, load.seconds)
        assert outcome.kept, (load.name, outcome.shares)
        assert outcome.pod_seconds / load.seconds < 8, "not by pods that do nothing"
    outcome = simulate(hpa, cluster, spike.at, spike.most, spike.seconds)
    late = [row for row in outcome.rows if 1320 <= row[0] < 2400]
    assert all(p99 < 2.5 for *_, p99, _ in late), "two minutes after a load four times as large"
    assert outcome.rows[-1][2] < max(row[2] for row in outcome.rows), "pods go when it is over"


def test_targets_above_what_a_pod_can_do_at_once_run_pods_full():
    """Why they are what they are: with 8 inside, two cores are busy nearly always before a pod comes."""
    hpa = Hpa(2, 10, {"weakseg_inflight": 8.0}, Rules(), Rules(300.0))
    assert not simulate(hpa, Cluster(), lambda _: 60.0, 60.0, 3600).kept


def test_clients_that_stay_on_the_pods_that_they_met_leave_new_ones_idle():
    hpa = hpa_from_manifest(MANIFEST)
    _, _, spike = loads(60.0)
    stay = simulate(hpa, Cluster(age_s=100000.0), spike.at, spike.most, spike.seconds)
    renew = simulate(hpa, Cluster(age_s=60.0), spike.at, spike.most, spike.seconds)
    assert renew.late < stay.late / 2


def test_sizing_has_a_pod_to_spare():
    text = sizing(Server(cores=2, alone=20.0, busy=20.0, idle_mib=512.0), 512)
    assert text.splitlines()[1].split() == ["10", "2", "4", "4.0"]  # 10 of 14; 2048 MiB each
    assert "2048 MiB a pod" in text


def test_figures_come_from_lines(tmp_path):
    machine = "4 x a processor"
    rows = [("serving.idle_rss_mib", 300.0), ("serving.vs_bare.1", 30.0), ("serving.vs_bare.4", 40.0)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"name": name, "ours": ours, "machine": machine}) for name, ours in rows))
    assert server_from_lines(path) == Server(4, 30.0, 40.0, 300.0)


def test_what_is_simulated_is_what_was_measured_and_promised():
    """The server of docs/results.md with its defaults, the objectives of deploy's rules."""
    results = (ROOT / "docs" / "results.md").read_text()
    alone, busy = re.search(r"^\| at 1 / 4 / 64 callers[^|]*\| ([\d.]+) / ([\d.]+) / ", results, re.MULTILINE).groups()
    (idle_mib,) = re.findall(r"^\| `serving.idle_rss_mib`[^|]*\| (\d+) ", results, re.MULTILINE)
    config = ServeConfig()
    assert Server() == Server(2, float(alone), float(busy), float(idle_mib), config.queue_limit + config.max_batch)
    groups = yaml.safe_load((ROOT / "deploy" / "monitoring" / "rules.yaml").read_text())["groups"]
    budgets = {
        rule["labels"]["slo"]: float(rule["expr"].removeprefix("vector(").removesuffix(")"))
        for group in groups
        for rule in group["rules"]
        if rule.get("record") == "slo:weakseg_error_budget:ratio"
    }
    assert {"availability": GOALS["refused"], "latency": GOALS["late"], "queue_wait": GOALS["waited"]} == budgets


def test_documented_sizes_are_what_is_computed():
    said = (ROOT / "docs" / "autoscaling.md").read_text()
    *rows, note = sizing(Server(), settings_number(SETTINGS, "WEAKSEG_IMAGE_MEMORY_MIB", 1024)).splitlines()[1:]
    assert all(f"| {' | '.join(row.split())} |\n" in said for row in rows) and len(rows) == 5
    assert note.partition(" at the most")[0] in said


def test_the_command_prints_and_draws(tmp_path, capsys):
    main(["--peak", "4", "--picture", str(tmp_path / "a.svg")])
    said = capsys.readouterr().out
    assert "autoscaling.spike.late" in said and "images/s a core" in said
    assert ElementTree.fromstring((tmp_path / "a.svg").read_text()).tag.endswith("svg")

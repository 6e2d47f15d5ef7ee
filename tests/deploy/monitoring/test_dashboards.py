"""deploy/monitoring/dashboards: Grafana would show them, and they ask for nothing that is not there."""

import itertools
import json
import re
from pathlib import Path

import pytest

from tests.deploy.monitoring.promql import asked

FOLDER = Path(__file__).parents[3] / "deploy" / "monitoring" / "dashboards"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
SCHEMA = 42  # of Grafana 12.2 and later; older dashboards are migrated, newer ones may not be understood
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
OF_TARGETS = {"namespace", "job", "instance"}
OF_ALERTS = {"alertname", "alertstate", "severity"}  # Prometheus' own metric of alerts has those of the alert, too
UNITS = {"none", "short", "s", "bytes", "percentunit", "reqps", "ops", "bool"}
PANELS = {"row", "stat", "table", "timeseries"}

pytestmark = pytest.mark.parametrize("name", BOARDS)


def panels(name):
    return BOARDS[name]["panels"]


def charts(name):
    return [panel for panel in panels(name) if panel["type"] != "row"]


def expressions(name):
    """Of all panels, with Grafana's variables filled in."""
    for panel in charts(name):
        for target in panel["targets"]:
            expr = target["expr"].replace("$__rate_interval", "5m")
            yield panel, target, re.sub(r"\$\w+\|?", ".*", expr)


def variables(name):
    return {variable["name"]: variable for variable in BOARDS[name]["templating"]["list"]}


def test_of_a_schema_that_grafana_reads(name):
    board = BOARDS[name]
    assert board["schemaVersion"] == SCHEMA and board["uid"] == f"weakseg-{name}" and board["tags"] == ["weakseg"]
    assert board["title"] and board["description"] and "id" not in board, "an id belongs to one Grafana"


def test_titles_and_uids_are_of_one_dashboard_each(name):
    assert [board["uid"] for board in BOARDS.values()].count(BOARDS[name]["uid"]) == 1
    titles = [panel["title"] for panel in panels(name)]
    assert all(titles) and len(set(titles)) == len(titles)


def test_panels_have_ids_types_and_units(name):
    ids = [panel["id"] for panel in panels(name)]
    assert len(set(ids)) == len(ids) and {panel["type"] for panel in panels(name)} <= PANELS
    assert {panel["fieldConfig"]["defaults"]["unit"] for panel in charts(name)} <= UNITS


def test_panels_lie_side_by_side_within_the_grid(name):
    taken = [panel["gridPos"] for panel in panels(name)]
    for place in taken:
        assert place["x"] >= 0 and place["w"] > 0 and place["h"] > 0 and place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(taken, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    rows = {range(place["y"], place["y"] + place["h"]) for place in taken}
    assert set().union(*rows) == set(range(max(map(max, rows)) + 1)), "no gaps"


def test_the_data_source_is_a_variable(name):
    sources = [panel["datasource"] for panel in charts(name)]
    sources += [target["datasource"] for panel in charts(name) for target in panel["targets"]]
    sources += [one["datasource"] for one in variables(name).values() if one["type"] == "query"]
    assert sources and all(source == DATASOURCE for source in sources)
    assert variables(name)["datasource"]["type"] == "datasource"


def test_variables_are_there_and_used(name):
    text = json.dumps([charts(name), BOARDS[name]["templating"]])
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"}
    assert used == variables(name).keys()


def test_queries_name_what_is_exposed(name, exposed, recorded):
    for panel, target, expr in expressions(name):
        found = asked(expr)
        assert found.metrics <= exposed.labels.keys() | recorded | {"ALERTS"}, panel["title"]
        own = {label for metric in found.metrics & exposed.labels.keys() for label in exposed.labels[metric]}
        own |= OF_TARGETS | (OF_ALERTS | {"model", "version"} if "ALERTS" in found.metrics else set())
        own |= {"slo"} if found.metrics & recorded else set()
        shown = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
        assert found.labels | shown | {label for _, label, _ in found.matchers} <= own, panel["title"]
        for metric, label, value in found.matchers:
            if metric in exposed.labels and label not in OF_TARGETS and value != ".*":
                assert set(value.split("|")) <= exposed.values(metric, label), panel["title"]


def test_variables_ask_for_what_is_exposed(name, exposed):
    for variable in variables(name).values():
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
            (metric,) = asked(re.sub(r"\$\w+", ".*", selector)).metrics
            assert metric in exposed.labels and label in exposed.labels[metric].keys() | OF_TARGETS


def test_each_target_of_a_panel_has_a_letter_of_its_own(name):
    for panel in charts(name):
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), panel["title"]


def test_every_metric_of_the_service_is_on_a_dashboard_or_in_a_rule(name, exposed, rules):
    """Else nobody would see it."""
    shown = set().union(*(asked(expr).metrics for board in BOARDS for _, _, expr in expressions(board)))
    shown |= set().union(*(asked(rule["expr"]).metrics for rule in rules))
    families = {re.sub(r"_(bucket|sum|count)$", "", metric) for metric in shown}
    ours = {re.sub(r"_(bucket|sum|count)$", "", metric) for metric in exposed.labels if metric.startswith("weakseg_")}
    assert ours <= families

import json
import re

from weakseg.environment import PACKAGES, describe
from weakseg.text import table


def test_the_record_is_json_and_names_what_matters():
    record = json.loads(json.dumps(describe(seed=7)))
    assert record["seed"] == 7
    assert record["machine"]["cpus"] >= 1
    assert record["machine"]["memory_gib"] > 0
    assert set(record["packages"]) <= set(PACKAGES)
    assert re.match(r"\d+\.", record["packages"]["numpy"])
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["commit"])


def test_tables_align_text_left_and_numbers_right():
    assert table(["stage", "n"], [["a", "1"], ["bcd", "10"]]) == "stage   n\na       1\nbcd    10"
    assert table(["x", "y"], []) == "x  y"

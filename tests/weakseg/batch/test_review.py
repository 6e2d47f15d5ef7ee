"""Which masks come first."""

import pytest

from weakseg.batch.review import least_certain, ranking_csv, uncertainty


def row(uri, present=("cat",), classes=(("cat", 0.9),), undecided_px=0, confidence=0.9, status="ok"):
    return {
        "uri": uri,
        "status": status,
        "width": 10,
        "height": 10,
        "present": list(present),
        "classes": [{"value": 1, "name": name, "area_px": 5, "confidence": sure} for name, sure in classes],
        "quality": {"confidence": confidence, "entropy": 0.1, "undecided_px": undecided_px},
        "outputs": {"mask": {"path": f"masks/{uri}.png"}},
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.05),
        ({"undecided_px": 40}, 0.25),
        ({"classes": ()}, 0.5),
        ({"present": ("cat", "dog")}, 0.275),
        ({"present": (), "classes": ()}, 0.05),
        ({"present": (), "classes": (), "confidence": None}, 0.5),
        ({"present": ()}, 0.05),
        ({"undecided_px": 100, "classes": (), "confidence": None}, 1.0),
    ],
)
def test_uncertainty(changes, expected):
    assert uncertainty(row("a", **changes)) == pytest.approx(expected)


def test_the_least_certain_come_first():
    rows = [row("sure"), row("lost", classes=()), row("b", undecided_px=20), row("a", undecided_px=20)]
    rows.append(row("broken", status="failed", undecided_px=100))
    assert [one["uri"] for one in least_certain(rows, 3)] == ["lost", "a", "b"]
    assert ranking_csv(least_certain(rows, 1)) == b"image,uncertainty,mask\nlost,0.500000,masks/lost.png\n"

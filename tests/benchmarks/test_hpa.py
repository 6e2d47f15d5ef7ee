"""The algorithm in closed form, by the examples and rules of Kubernetes' documentation."""

from pathlib import Path

import pytest

from benchmarks.hpa import Controller, Hpa, Policy, Rules, hpa_from_manifest

FREE = Rules(0.0, (Policy("Pods", 1000, 15),))


def ask(values, current, target=100.0, now=0.0, **options):
    hpa = Hpa(1, 100, {"x": target}, **({"up": FREE, "down": FREE} | options))
    return Controller(hpa).replicas(now, current, {"x": values})


@pytest.mark.parametrize(
    ("values", "current", "replicas"),
    [
        ([200.0], 1, 2),  # "if the current metric value is 200m, and the desired value is 100m, replicas are doubled"
        ([50.0, 50.0], 2, 1),
        ([109.0] * 10, 10, 10),  # within a tenth
        ([91.0] * 10, 10, 10),
        ([111.0] * 10, 10, 12),
        ([89.0] * 10, 10, 9),
        ([200.0, None], 2, 2),  # the one without a value counts as 0: on target
        ([400.0, None], 2, 4),
        ([50.0, None], 2, 2),  # ... as on target when it asks for fewer: 150 / 200 of 2
        ([0.0, None, None, None], 4, 3),
        ([None, None], 2, 2),
    ],
)
def test_desired(values, current, replicas):
    assert ask(values, current) == replicas


def test_the_metric_that_asks_for_most_counts():
    hpa = Hpa(1, 100, {"x": 100.0, "y": 1.0}, FREE, FREE)
    assert Controller(hpa).replicas(0, 2, {"x": [100.0, 100.0], "y": [3.0, 3.0]}) == 6


def test_bounds():
    hpa = Hpa(2, 5, {"x": 1.0}, FREE, FREE)
    assert Controller(hpa).replicas(0, 3, {"x": [100.0] * 3}) == 5
    assert Controller(hpa).replicas(0, 3, {"x": [0.0] * 3}) == 2


def test_policies_count_what_was_done_in_their_period():
    rules = Rules(0.0, (Policy("Percent", 100, 30), Policy("Pods", 2, 30)))
    controller = Controller(Hpa(1, 100, {"x": 1.0}, up=rules))
    steps, current = [], 1
    for now in (0, 15, 30, 45, 60):
        current = controller.replicas(now, current, {"x": [50.0] * current})
        steps.append(current)
    assert steps == [3, 3, 6, 6, 12], "1 + 2, then twice as many in each 30 s"


def test_min_takes_the_policy_that_changes_least():
    rules = Rules(0.0, (Policy("Percent", 20, 60), Policy("Pods", 4, 60)), "Min")
    controller = Controller(Hpa(1, 100, {"x": 1.0}, down=rules))
    assert controller.replicas(0, 10, {"x": [0.0] * 10}) == 8
    assert controller.replicas(15, 8, {"x": [0.0] * 8}) == 8
    assert controller.replicas(60, 8, {"x": [0.0] * 8}) == 6


def test_it_scales_down_to_the_most_that_was_wanted_in_the_window():
    controller = Controller(Hpa(1, 100, {"x": 1.0}, FREE, Rules(300.0, (Policy("Percent", 100, 15),))))
    assert controller.replicas(0, 4, {"x": [2.0] * 4}) == 8
    for now in range(15, 300, 15):
        assert controller.replicas(now, 8, {"x": [0.25] * 8}) == 8
    assert controller.replicas(300, 8, {"x": [0.25] * 8}) == 2


def test_it_scales_up_to_the_least_that_was_wanted_in_the_window():
    controller = Controller(Hpa(1, 100, {"x": 1.0}, Rules(60.0, (Policy("Pods", 100, 15),)), FREE))
    assert controller.replicas(0, 2, {"x": [1.0] * 2}) == 2
    assert controller.replicas(15, 2, {"x": [4.0] * 2}) == 2
    assert controller.replicas(60, 2, {"x": [4.0] * 2}) == 8


def test_a_manifest(tmp_path):
    path = tmp_path / "hpa.yaml"
    path.write_text(
        """
spec:
  minReplicas: 2
  maxReplicas: 10
  metrics:
    - type: Pods
      pods: {metric: {name: weakseg_inflight}, target: {type: AverageValue, averageValue: 1500m}}
  behavior:
    scaleDown:
      stabilizationWindowSeconds: 120
      policies: [{type: Pods, value: 1, periodSeconds: 60}]
"""
    )
    found = hpa_from_manifest(path)
    assert found == Hpa(2, 10, {"weakseg_inflight": 1.5}, Rules(), Rules(120, (Policy("Pods", 1, 60),)))
    path.write_text(path.read_text().replace("type: Pods\n", "type: Resource\n"))
    with pytest.raises(ValueError, match="expected metrics of type Pods"):
        hpa_from_manifest(path)


def test_ours_is_understood():
    found = hpa_from_manifest(Path(__file__).parents[2] / "deploy/kustomize/components/hpa/hpa.yaml")
    assert set(found.targets) <= {"weakseg_queue_depth", "weakseg_inflight"} and found.least >= 2

import math
import sys

from service.adapters.mlflow_values import curve_of, fit, flatten, metric_name, split_long


def test_params_are_named_by_path():
    assert flatten({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}


def test_long_values_are_replaced_by_references_without_their_folders():
    stored, artifacts = split_long({"short": 1, "model.x/../y": "z" * 11}, 10)
    path = "long-values/model.x_.._y.txt"
    assert artifacts == {path: "z" * 11}
    assert stored == {"short": "1", "model.x/../y": f"11 characters, in the artifact {path}"}
    assert split_long({"a": "z" * 10}, 10) == ({"a": "z" * 10}, {})


def test_text_is_cut_at_the_end_of_a_line():
    assert fit("a\nb", 3, "…") == "a\nb"
    assert fit("first\nsecond\nthird", 15, "…") == "first\n\n…"


def test_names_of_metrics_have_only_characters_that_mlflow_allows():
    assert metric_name("norm=sync optimizer.lr=[1]/best") == "norm_sync optimizer.lr__1_/best"
    assert len(metric_name("x" * 300)) == 250


def test_infinities_are_restored_and_points_are_sorted():
    largest = sys.float_info.max
    assert curve_of({2: -largest, 1: largest, 0: 0.5}) == [(0, 0.5), (1, math.inf), (2, -math.inf)]

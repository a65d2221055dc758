import time

import pytest

from trainer.jobspec import read_yaml


def test_yaml_numbers_are_those_of_json(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("optimizer: {lr: 1e-3}\nsteps: 10\nname: 1e\n")
    assert read_yaml(path) == {"optimizer": {"lr": 1e-3}, "steps": 10, "name": "1e"}


def bomb(levels, width):
    """Return YAML of a few hundred bytes that expands to width ** levels values."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * width) + "]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb(9, 9), "must have at most 20 aliases"),
        ("a: &a {k: 1}\nb: {<<: [" + ", ".join(["*a"] * 30) + "]}", "must have at most 20 aliases"),
        ("[" * 3_000 + "]" * 3_000, "nested this deeply"),
        ("{a: " * 3_000 + "1" + "}" * 3_000, "nested this deeply"),
        ("x: " + "y" * 1_000_001, "must have at most 1,000,000 bytes"),
    ],
)
def test_oversized_yaml_is_rejected(tmp_path, text, reason):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(ValueError, match=reason) as refused:
        read_yaml(path)
    assert str(path) in str(refused.value)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("2001-99-99", "must be a valid timestamp .got '2001-99-99'."),
        ("2001-01-01 00:00:00 +99:00", "must be a valid timestamp"),
        ("!!timestamp x", "must be a valid timestamp .got 'x'."),
        ("0b_", "must be a valid int .got '0b_'."),
        ("!!int x", "must be a valid int .got 'x'."),
        ('!!int ""', "must be a valid int .got ''."),
        ("9" * 5_000, f"must be a valid int .got '{'9' * 50}'."),
        ("0x" + "f" * 5_000, "must be a valid int"),
        ("!!bool x", "must be a valid bool .got 'x'."),
        ("!!float x", "must be a valid float .got 'x'."),
        ("1" + ":00" * 300 + ".5", "must be a valid float"),
    ],
)
def test_a_value_that_does_not_match_its_tag_is_named_with_its_position(tmp_path, value, reason):
    path = tmp_path / "spec.yaml"
    path.write_text(f"steps: 1\na: [{value}]\n")
    with pytest.raises(
        ValueError, match=f"(?s)spec.yaml: must be valid YAML: value: {reason}.*line 2, column 5"
    ):
        read_yaml(path)


def test_few_aliases_are_accepted(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("base: &base {steps: 1}\nother: {<<: *base, seed: 2}")
    assert read_yaml(path)["other"] == {"steps": 1, "seed": 2}

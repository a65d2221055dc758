"""Figures of a run: accuracy and percentiles of layer inputs.

See Ioffe & Szegedy 2015, Figure 1.
"""

import re
from collections import defaultdict
from pathlib import Path

from trainer.tracking.outbox import read_lines

PERCENTILE = re.compile(r"^probe/(?P<layer>.+)/unit(?P<unit>\d+)/p(?P<percent>\d+)$")
Curve = list[tuple[int, float]]
"""Steps and values."""


def write_figures(metrics: Path, folder: Path) -> list[Path]:
    """Draw the metrics of a file into PNG files in `folder`; return their paths.

    `accuracy.png` is Figure 1 (a) for this run, and `percentiles-<layer>.png`, one per layer with measured
    percentiles, is (b) without and (c) with batch normalisation. Metrics that were not measured are not
    drawn.

    Args:
        metrics: file of JSON lines; lines with `step` and `metrics` are used.
        folder: target folder, which is created if missing.
    """
    curves = _read(metrics)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if "accuracy" in curves:
        paths.append(_draw({"": curves["accuracy"]}, "test accuracy", "", folder / "accuracy.png"))
    layers: dict[tuple[str, str], dict[str, Curve]] = defaultdict(dict)
    for name, curve in curves.items():
        if found := PERCENTILE.match(name):
            layers[found["layer"], found["unit"]][f"{found['percent']} %"] = curve
    for (layer, unit), lines in layers.items():
        file = re.sub(r"[^\w.-]", "-", f"percentiles-{layer}.png")
        paths.append(_draw(lines, "percentiles over the batch", f"{layer}, unit {unit}", folder / file))
    return paths


def _read(metrics: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = defaultdict(list)
    for line in read_lines(metrics.read_bytes()):
        for name, value in line.get("metrics", {}).items():
            curves[name].append((line["step"], value))
    return curves


def _draw(curves: dict[str, Curve], quantity: str, title: str, path: Path) -> Path:
    from matplotlib.figure import Figure  # imported here: it takes a second

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, label=label)
    axes.set(xlabel="step", ylabel=quantity, title=title)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
    return path

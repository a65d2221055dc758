"""Reproduction of published claims: trains recipes without Ray, judges them by their rules, and prints both.

    python benchmarks/paper.py                          the shortest recipe
    python benchmarks/paper.py all --markdown FILE      all recipes; twenty minutes on two cores
    python benchmarks/paper.py lr-sweep init-scale --seeds 0 1 2

Workers are processes joined by gloo, with one thread each. As many teams of them train in parallel as there
are cores.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from service.api.schemas import VerdictView
from service.cli.report_tables import FINDING_HEADINGS, finding_cells
from service.domain.comparisons import Variant, expand, without_seed
from service.domain.recipes import RECIPES, Recipe, read_recipe
from service.domain.verdicts import Run, judge
from trainer.data import open_dataset
from trainer.distributed import RankInfo
from trainer.errors import Diverged
from trainer.jobspec import JobSpec
from trainer.training.loop import train

PATHS = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
QUICKEST_RECIPE = "world-size-invariance"
JOIN_SECONDS = 300

Point = tuple[Variant, JobSpec]


class Curves:
    """Metrics logger that keeps every metric by step."""

    def __init__(self) -> None:
        self.by_metric: dict[str, list[tuple[int, float]]] = {}

    def resume(self, *_: Any) -> None:
        """Do nothing: runs are not saved."""

    def log(self, step: int, metrics: Mapping[str, float], kind: str = "evaluation") -> None:
        """Keep metrics measured after `step` steps."""
        for name, value in metrics.items():
            self.by_metric.setdefault(name, []).append((step, value))

    def update(self, step: int) -> None:
        """Do nothing."""


def serve(channel: Connection) -> None:
    """Train the runs received from `channel` until it closes, and send their results."""
    torch.set_num_threads(1)
    while True:
        try:
            point, rank, world_size, store = channel.recv()
        except EOFError:
            return
        if world_size > 1:
            limit = timedelta(seconds=JOIN_SECONDS)
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit
            )
        run = train_point(point, RankInfo(rank, world_size, torch.device("cpu")))
        channel.send(run if rank == 0 else None)
        if world_size > 1:
            dist.destroy_process_group()


def train_point(point: Point, worker: RankInfo) -> Run:
    """Train one run with the training loop of the service."""
    variant, spec = point
    curves, weights, diverged = Curves(), None, False
    dtype = torch.float64 if spec.precision == "fp64" else torch.float32
    dataset = open_dataset(spec, worker.rank, worker.world_size, worker.device, dtype)
    try:
        model = train(spec, worker, curves, dataset).model
        if spec.precision == "fp64":  # those of float32 runs are not compared
            weights = torch.cat([value.double().flatten() for value in model.state_dict().values()]).tolist()
    except Diverged:
        diverged = True
    finally:
        dataset.close()
    return Run(
        variant=without_seed(variant),
        seed=spec.seed,
        curves=curves.by_metric,
        diverged=diverged,
        weights=weights,
    )


class Teams:
    """Groups of processes that train together, started on demand."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="paper-")
        self._members: list[tuple[Any, Connection]] = []
        self._stores = iter(range(1 << 31))

    def __enter__(self) -> "Teams":
        return self

    def __exit__(self, *_: object) -> None:
        for process, channel in self._members:
            channel.close()
            process.join(5)
            process.kill()
        self._folder.cleanup()

    def run(self, points: Sequence[Point]) -> list[Run]:
        """Train all points; points with the same number of workers run in parallel."""
        runs: list[Run] = []
        for size in sorted({spec.max_workers for _, spec in points}):
            todo: SimpleQueue[Point] = SimpleQueue()
            for point in points:
                if point[1].max_workers == size:
                    todo.put(point)
            teams = self._teams(size)
            threads = [
                threading.Thread(target=self._work, args=(team, todo, runs), daemon=True) for team in teams
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if len(runs) < len(points):
            raise RuntimeError(
                f"{len(points) - len(runs)} of {len(points)} runs ended in an error, which is above"
            )
        return runs

    def _teams(self, size: int) -> list[list[Connection]]:
        """Start as many teams of `size` processes as the cores allow, and at least one."""
        count = max(1, (os.cpu_count() or 1) // size)
        while len(self._members) < count * size:
            here, there = self._context.Pipe()
            process = self._context.Process(target=serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._members.append((process, here))
        channels = [channel for _, channel in self._members]
        return [channels[first : first + size] for first in range(0, count * size, size)]

    def _work(self, team: list[Connection], todo: "SimpleQueue[Point]", runs: list[Run]) -> None:
        while True:
            try:
                point = todo.get_nowait()
            except Empty:
                return
            store = Path(self._folder.name, f"store-{next(self._stores)}")
            for rank, channel in enumerate(team):
                channel.send((point, rank, len(team), store))
            first, *_ = [channel.recv() for channel in team]
            runs.append(first)


def measure(recipe: Recipe, preset: str, seeds: Sequence[int] | None, teams: Teams) -> str:
    """Train a preset of a recipe, and return the results in Markdown."""
    began = time.monotonic()
    comparison = recipe.presets[preset]  # type: ignore[index]
    matrix = comparison.matrix | ({"seed": list(seeds)} if seeds else {})
    points = expand(comparison.spec, matrix, comparison.variants)
    runs = teams.run(points)
    seconds = time.monotonic() - began
    steps = sum(spec.steps for _, spec in points)
    diverged = sum(run.diverged for run in runs)
    counts = f"{len(runs)} runs, {len({run.seed for run in runs})} seeds, {steps:,} steps"
    return "\n".join(
        [
            f"## {recipe.name}: {(verdict := VerdictView.of(recipe, judge(recipe, runs))).judgement}",
            "",
            f"**Claim.** {recipe.claim} ({recipe.source})",
            "",
            f"**Reported.** {recipe.paper}",
            "",
            f"**Falsified if** {recipe.falsified_if}.",
            "",
            *table(verdict),
            "",
            f"Preset `{preset}`: {counts} in {seconds:.0f} s"
            + (f"; {diverged} runs diverged." if diverged else "; no run diverged."),
            "",
        ]
    )


def table(verdict: VerdictView) -> list[str]:
    """Return one row per finding: median and range over seeds."""
    rows = [FINDING_HEADINGS, ["---"] * len(FINDING_HEADINGS), *map(finding_cells, verdict.findings)]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipes", nargs="*", default=[QUICKEST_RECIPE], metavar="RECIPE", help=f"all, {', '.join(PATHS)}"
    )
    parser.add_argument("--preset", default="quick", choices=["quick", "paper", "demo"])
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the recipe's own")
    parser.add_argument("--markdown", type=Path, help="file that is written as well")
    options = parser.parse_args()
    names = list(PATHS) if options.recipes == ["all"] else options.recipes
    if unknown := [name for name in names if name not in PATHS]:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(PATHS)}")
    written = []
    with Teams() as teams:
        for name in names:
            written.append(measure(read_recipe(PATHS[name]), options.preset, options.seeds, teams))
            print(written[-1], flush=True)
            if options.markdown:
                options.markdown.write_text("\n".join(written))


if __name__ == "__main__":
    main()

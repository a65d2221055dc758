"""Demo: starts the stack, compares BN with no BN, and shows the report."""

import os
import time
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from service.api.schemas import ComparisonView
from service.cli.browser import sign_in_link
from service.cli.progress import JobBars
from service.cli.report_tables import report_table, save_plot
from service.client import Client
from service.domain.recipes import read_recipe
from service.local.stack import LocalStack, StackError, first_signal_interrupts

RECIPE = Path(str(files("trainer"))) / "recipes" / "fig1-activations.yaml"
FEWEST_CPUS = 2
"""The demo's jobs have two workers, which a machine of one core runs by turns."""
MOST_SECONDS = 1_800
"""A machine that needs longer for the demo has something wrong with it."""


def run_demo(data_dir: Path, console: Console, *, keep: bool, recipe_path: Path = RECIPE) -> int:
    """Run the demo preset of a recipe on a new stack and return the exit code."""
    began = time.monotonic()
    body = read_recipe(recipe_path).request("demo")
    console.print(f"Starting Ray, MLflow and the API in {data_dir} …")
    with first_signal_interrupts(), LocalStack(data_dir, cpus=max(FEWEST_CPUS, os.cpu_count() or 1)) as stack:
        connection = stack.connection
        console.print(
            f"Ready after {time.monotonic() - began:.0f} s: {connection.url}/docs and {connection.mlflow_url}/"
        )
        with Client(connection.url, connection.token) as client:
            comparison = client.submit_comparison(body)
            console.print(
                f"Submitted {comparison.id}: {len(comparison.jobs)} jobs by POST {connection.url}/v1/comparisons"
            )

            with JobBars(console) as bars:

                def watch(comparison: ComparisonView) -> None:
                    bars.show(comparison.jobs)
                    if reason := stack.wait(0):
                        raise StackError(f"the stack has stopped: {reason}")

                comparison = client.wait(comparison.id, MOST_SECONDS, watch)
            report = client.report(comparison.id, curves=True)
            link = sign_in_link(client, comparison.mlflow_url)
        console.print(report_table(report))
        picture = data_dir / f"{comparison.name}.png"
        save_plot(report, picture)
        console.print(f"Plot of {report.metric} against steps: {picture}")
        if keep:
            console.print(f"MLflow's runs: {link}", soft_wrap=True)
            console.print("               (signs a browser in once, within ten minutes; `syncbn open` prints another)")
        else:
            console.print(f"MLflow's runs: {comparison.mlflow_url}", soft_wrap=True)
        console.print(f"API docs:      {connection.url}/docs")
        console.print(f"Done in {time.monotonic() - began:.0f} s.")
        if keep:
            console.print("The servers stay up until Ctrl-C.")
            if reason := stack.wait():
                raise StackError(f"the stack has stopped: {reason}")
        else:
            console.print(
                "The servers stop now; `syncbn up` (or `syncbn demo --keep`) brings them back with these runs."
            )
    return 0 if all(job.state == "succeeded" for job in comparison.jobs) else 1

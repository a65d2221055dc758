"""Demo: starts the stack, compares BN with no BN, and shows the report."""

import os
import time
from pathlib import Path

from rich.console import Console

from service.api.schemas import ComparisonView
from service.cli.browser import comparison_page, sign_in_link
from service.cli.progress import JobBars
from service.cli.report_tables import report_lines
from service.client import Client
from service.domain.mlflow_views import home_url
from service.domain.recipes import RECIPES, read_recipe
from service.local.stack import LocalStack, StackError, first_signal_interrupts
from trainer.atomic import atomic_write

RECIPE = RECIPES / "fig1-activations.yaml"
MIN_CPUS = 2
"""Cores that Ray is given at least, since the jobs of the demo have two workers."""
TIMEOUT_SECONDS = 1_800
"""Timeout of the demo."""


def run_demo(data_dir: Path, console: Console, *, keep: bool, recipe_path: Path = RECIPE) -> int:
    """Run the demo preset of a recipe on a new stack and return the exit code."""
    began = time.monotonic()
    body = read_recipe(recipe_path).request("demo")
    console.print(f"Starting Ray, MLflow and the API in {data_dir} …")
    with first_signal_interrupts(), LocalStack(data_dir, cpus=max(MIN_CPUS, os.cpu_count() or 1)) as stack:
        connection = stack.connection
        console.print(
            f"Ready after {time.monotonic() - began:.0f} s: {connection.url}/docs and "
            f"{home_url(connection.mlflow_url)}"
        )
        with Client(connection.url, connection.token) as client:
            comparison = client.submit_comparison(body)
            console.print(
                f"Submitted {comparison.id}: {len(comparison.jobs)} jobs by POST "
                f"{connection.url}/v1/comparisons"
            )

            with JobBars(console) as bars:

                def watch(comparison: ComparisonView) -> None:
                    bars.show(comparison.jobs)
                    # Without this check a dead server would only show as a timeout.
                    if reason := stack.wait(0):
                        raise StackError(f"the stack has stopped: {reason}")

                comparison = client.wait(comparison.id, TIMEOUT_SECONDS, watch)
            report = client.report(comparison.id, curves=True)
            file = data_dir / f"{comparison.name}.html"
            atomic_write(file, client.document(comparison.id))
            link = sign_in_link(client, comparison_page(comparison.id))
        console.print(report_lines(report))
        console.print(f"Done in {time.monotonic() - began:.0f} s. Report file: {file}")
        if keep:
            console.print(
                f"The servers stay up until Ctrl-C. `syncbn open {comparison.id}` prints another link to the "
                "page below, which signs a browser in once, within ten minutes."
            )
            console.print(f"Verdict, curves and percentiles: {link}", soft_wrap=True)
            if reason := stack.wait():
                raise StackError(f"the stack has stopped: {reason}")
        else:
            console.print("The servers stop now; `syncbn up` brings them back with these runs.")
    return 0 if all(job.state == "succeeded" for job in comparison.jobs) else 1

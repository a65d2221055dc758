"""Screenshots of the pages and of MLflow for README.md and docs/, on a real stack.

Runs the demo's comparison (minutes) and opens its pages in Chromium: `make screenshots`.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from service.cli.demo import RECIPE
from service.client import Client
from service.domain.recipes import read_recipe
from service.local.stack import LocalStack

IMAGES = Path(__file__).parent / "images"
WIDTH = 1200
TIMEOUT_SECONDS = 1_800
HOST = "syncbn.example"
"""Name of this machine for Chromium: on 127.0.0.1, MLflow opens its assistant over the page."""
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    f"--host-resolver-rules=MAP {HOST} 127.0.0.1",
]


def shoot(page: Page, name: str, height: int, width: int = WIDTH) -> None:
    """Write a picture of the upper part of a page."""
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(1_500)
    page.screenshot(path=IMAGES / f"{name}.png")
    print(f"wrote {IMAGES / name}.png")


def by_name(url: str) -> str:
    """Return a URL of this machine with its name."""
    return url.replace("127.0.0.1", HOST, 1)


def shoot_all(page: Page, client: Client, comparison_id: str) -> None:
    """Write all pictures."""
    comparison = client.comparison(comparison_id)
    job = next(job for job in comparison.jobs if job.norm == "sync")
    page.goto(by_name(client.create_sign_in_link(f"/comparisons/{comparison_id}").url))
    page.locator("#chart .uplot").wait_for()
    shoot(page, "comparison", 1_560)
    for name, path, height in (
        ("jobs", "/jobs", 640),
        ("job", f"/jobs/{job.id}", 1_100),
        ("submit", "/submit", 1_000),
    ):
        page.goto(by_name(f"{client.url.rstrip('/')}{path}"))
        shoot(page, name, height)
    assert comparison.mlflow_url is not None
    page.goto(by_name(comparison.mlflow_url))
    page.get_by_text("norm=sync").first.wait_for(timeout=120_000)
    shoot(page, "mlflow", 900, width=1_700)


def main() -> None:
    """Run the comparison and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a stack that runs already, with --token and --comparison")
    parser.add_argument("--token")
    parser.add_argument("--comparison")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        if options.url:
            with Client(options.url, options.token) as client:
                shoot_all(page, client, options.comparison)
            return
        with (
            tempfile.TemporaryDirectory() as folder,
            LocalStack(Path(folder), cpus=2) as stack,
            Client(stack.connection.url, stack.connection.token) as client,
        ):
            comparison = client.submit_comparison(read_recipe(RECIPE).request("demo"))
            client.wait(comparison.id, TIMEOUT_SECONDS, lambda seen: None)
            shoot_all(page, client, comparison.id)


if __name__ == "__main__":
    main()

"""Entry point of the `syncbn` command, also as `python -m service`."""

import sys

OURS = {"service", "trainer", "syncbn"}
EXTRAS = (
    "pip install 'syncbn[client]' for the commands that call a service, 'syncbn[service,trainer]' for "
    "up, demo and serve"
)


def main() -> None:
    """Run the command.

    Where a package is not installed, name the extras that install it and exit with status 1.
    """
    try:
        from service.cli.app import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OURS:
            raise
        sys.exit(f"syncbn: the package {package} is not installed; {EXTRAS}")


if __name__ == "__main__":
    main()

"""Watches torch.distributed: which collectives were issued, and of how many bytes each rank's part was."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist


@contextmanager
def record_collectives() -> Iterator[list[tuple[str, int]]]:
    """Yield a list that grows by (name, bytes) with each collective this process issues."""
    issued: list[tuple[str, int]] = []
    with (
        mock.patch.object(dist, "all_reduce", _recorded("all_reduce", 0, issued)),
        mock.patch.object(dist, "all_gather", _recorded("all_gather", 1, issued)),
    ):
        yield issued


def _recorded(name, position, issued):
    collective = getattr(dist, name)

    def record(*arguments, **options):
        issued.append((name, arguments[position].nbytes))
        return collective(*arguments, **options)

    return record

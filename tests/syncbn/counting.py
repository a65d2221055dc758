"""Watches torch.distributed: which collectives were issued, and of how many bytes each rank's part was."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist


@contextmanager
def record_collectives() -> Iterator[list[tuple[str, int]]]:
    """Yield a list that grows by (name, bytes) with each collective this process issues, whoever issues it."""
    issued: list[tuple[str, int]] = []
    with (
        mock.patch.object(dist.ProcessGroup, "allreduce", _recorded("allreduce", 0, "all_reduce", issued)),
        mock.patch.object(dist.ProcessGroup, "allgather", _recorded("allgather", 1, "all_gather", issued)),
    ):
        yield issued


def _recorded(method, position, name, issued):
    collective = getattr(dist.ProcessGroup, method)

    def record(group, *arguments, **options):
        issued.append((name, sum(tensor.nbytes for tensor in arguments[position])))
        return collective(group, *arguments, **options)

    return record

"""Watches torch.distributed: which collectives were issued, and of how many bytes each rank's part was."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.distributed as dist


@contextmanager
def record_collectives() -> Iterator[list[tuple[str, int]]]:
    """Yield a list that grows by (name, bytes) with each collective this process issues, whoever issues
    it.
    """
    issued: list[tuple[str, int]] = []
    with ExitStack() as patches:
        for kind in (dist.ProcessGroup, dist.ProcessGroupGloo):  # the layer issues its own on the latter
            for method, position, name in (("allreduce", 0, "all_reduce"), ("allgather", 1, "all_gather")):
                patches.enter_context(
                    mock.patch.object(kind, method, _recorded(kind, method, position, name, issued))
                )
        yield issued


def _recorded(kind, method, position, name, issued):
    collective = getattr(kind, method)

    def record(group, *arguments, **options):
        issued.append((name, sum(tensor.nbytes for tensor in arguments[position])))
        return collective(group, *arguments, **options)

    return record

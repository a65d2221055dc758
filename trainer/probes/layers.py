"""Layer statistics over the observations of all workers."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from syncbn import Moments
from trainer.distributed import RankInfo
from trainer.probes.hooks import Observation


class GatheredStats:
    """Moments of each hook point by part of the batch and worker.

    They are on the CPU, float64, and equal on every worker. Collectives: one all_gather of 8·(2C + 1) bytes
    for each hook point and part.
    """

    def __init__(self, seen: Sequence[Mapping[str, Observation]], worker: RankInfo) -> None:
        """Gather the observations `seen` of this worker, by part and hook point."""
        self._seen, self._worker = seen, worker
        packed = [observation.moments.pack() for part in seen for observation in part.values()]
        # One collective for all hook points and parts, instead of one each.
        vectors = worker.all_gather(torch.cat(packed))
        sizes = [len(vector) for vector in packed]
        unpacked = iter(
            zip(
                *(
                    [Moments.unpack(piece) for piece in torch.split(vector.cpu(), sizes)]
                    for vector in vectors
                ),
                strict=True,
            )
        )
        self.parts: list[dict[str, Sequence[Moments]]] = [
            {name: next(unpacked) for name in part} for part in seen
        ]
        """Moments by worker, for each part of the batch and hook point."""

    def total(self, place: str) -> Moments:
        """Return the moments over the whole global batch."""
        return Moments.merge([moments for part in self.parts for moments in part[place]])

    def mean_over_parts(self, place: str, measure: Callable[[Sequence[Moments]], float]) -> float:
        """Return the mean over parts of a measure of the workers' moments.

        To the norm, each part is a batch.
        """
        return sum(measure(part[place]) for part in self.parts) / len(self.parts)

    def units(self, places: Sequence[str]) -> dict[str, tuple[int, Tensor]]:
        """Return unit and values (samples · positions,) of each hook point.

        The values are those of the whole global batch. Collectives: one all_gather of 4 bytes (float64: 8)
        per value; the largest share determines the length.
        """
        keys = [(number, place) for number in range(len(self._seen)) for place in places]
        own = [self._seen[number][place].values for number, place in keys]
        counts = torch.stack(
            [torch.stack([moments.count for moments in self.parts[number][place]]) for number, place in keys],
            dim=1,
        ).long()
        # all_gather needs equal lengths; shares differ by a few samples, so they are padded.
        longest = int(counts.sum(1).max())
        mine = torch.cat(own)
        vectors = self._worker.all_gather(torch.nn.functional.pad(mine, (0, longest - len(mine))))
        found: dict[str, list[Tensor]] = {place: [] for place in places}
        for vector, sizes in zip(vectors, counts.tolist(), strict=True):
            for (_, place), piece in zip(keys, torch.split(vector.cpu()[: sum(sizes)], sizes), strict=True):
                found[place].append(piece)
        return {place: (self._seen[0][place].unit, torch.cat(pieces)) for place, pieces in found.items()}

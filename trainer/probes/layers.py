"""Layer statistics over the observations of all workers."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import Moments
from trainer.distributed import RankInfo
from trainer.probes.hooks import Observation


class GatheredStats:
    """The moments of each place, by part of the batch and worker; on the CPU, float64, the same on every worker.

    Collectives: one all_gather of 8·(2C + 1) bytes for each place and part.
    """

    def __init__(self, seen: Sequence[Mapping[str, Observation]], worker: RankInfo) -> None:
        """`seen` is this worker's, by part of the batch and place."""
        self._seen, self._worker = seen, worker
        packed = [observation.moments.pack() for part in seen for observation in part.values()]
        vectors = _gather(torch.cat(packed), worker)
        sizes = [len(vector) for vector in packed]
        unpacked = iter(
            zip(
                *([Moments.unpack(piece) for piece in torch.split(vector.cpu(), sizes)] for vector in vectors),
                strict=True,
            )
        )
        self.parts: list[dict[str, Sequence[Moments]]] = [{name: next(unpacked) for name in part} for part in seen]
        """By part of the batch and place: moments by worker."""

    def total(self, place: str) -> Moments:
        """Moments over the whole of the global batch."""
        return Moments.merge([moments for part in self.parts for moments in part[place]])

    def mean_over_parts(self, place: str, measure: Callable[[Sequence[Moments]], float]) -> float:
        """Mean, over the parts of the batch, of a measure of its moments by worker: each part is a batch to the norm."""
        return sum(measure(part[place]) for part in self.parts) / len(self.parts)

    def units(self, places: Sequence[str]) -> dict[str, tuple[int, Tensor]]:
        """Each place's unit and its values (samples · positions,) over the whole of the global batch.

        Collectives: one all_gather of 4 bytes (float64: 8) for each value; the largest share sets the length.
        """
        keys = [(number, place) for number in range(len(self._seen)) for place in places]
        own = [self._seen[number][place].values for number, place in keys]
        counts = torch.stack(
            [torch.stack([moments.count for moments in self.parts[number][place]]) for number, place in keys], dim=1
        ).long()
        longest = int(counts.sum(1).max())
        mine = torch.cat(own)
        vectors = _gather(torch.nn.functional.pad(mine, (0, longest - len(mine))), self._worker)
        found: dict[str, list[Tensor]] = {place: [] for place in places}
        for vector, sizes in zip(vectors, counts.tolist(), strict=True):
            for (_, place), piece in zip(keys, torch.split(vector.cpu()[: sum(sizes)], sizes), strict=True):
                found[place].append(piece)
        return {place: (self._seen[0][place].unit, torch.cat(pieces)) for place, pieces in found.items()}


def _gather(vector: Tensor, worker: RankInfo) -> list[Tensor]:
    """Return every worker's vector; all have the same length and dtype."""
    if worker.world_size == 1:
        return [vector]
    vectors = [torch.empty_like(vector) for _ in range(worker.world_size)]
    dist.all_gather(vectors, vector)
    return vectors

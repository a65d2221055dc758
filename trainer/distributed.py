"""Rank, world size and device of this process."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RankInfo:
    """This process's place among the workers. With more than one, torch's default process group is initialised."""

    rank: int
    world_size: int
    device: torch.device

"""Averaged weights (SWA), and running statistics for them.

torchrun --nproc-per-node 2 examples/average_weights.py
"""

import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn

from syncbn import convert_sync_batchnorm, update_population_statistics

gpu = torch.cuda.is_available()
if gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = "cuda" if gpu else "cpu"
dist.init_process_group("nccl" if gpu else "gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
x, target = torch.randn(20, 6), torch.randn(20, 2)
network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).to(device)
model = DistributedDataParallel(convert_sync_batchnorm(network), forward_sync_buffers=False)
averaged = AveragedModel(network)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
shares = [
    batch.tensor_split(world_size)[rank] for batch in torch.arange(20).split(8)
]  # of 8, 8 and 4 samples

for own in shares:
    loss = F.mse_loss(model(x[own].to(device)), target[own].to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    averaged.update_parameters(network)

# The averaged weights never had running statistics of their own. Both functions run training passes, so every
# rank calls them, with the same number of batches, and they measure the data of all ranks.
precise = copy.deepcopy(averaged)
batches = [x[own].to(device) for own in shares]
update_bn(batches, averaged)  # the mean over batches, each of the same weight
update_population_statistics(precise, batches)  # batches weighted by their number of values, in float64

dist.destroy_process_group()

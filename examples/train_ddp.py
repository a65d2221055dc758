"""DistributedDataParallel with batches that ranks share unevenly.

torchrun --nproc-per-node 2 examples/train_ddp.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from syncbn import convert_sync_batchnorm

gpu = torch.cuda.is_available()
if gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = "cuda" if gpu else "cpu"
dist.init_process_group("nccl" if gpu else "gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
images, labels = torch.randn(17, 3, 8, 8), torch.randint(4, (17,))
network = nn.Sequential(
    nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
).to(device)
convert_sync_batchnorm(network)  # before wrapping
# The buffers of the ranks are equal without a broadcast. Before torch 2.13: broadcast_buffers=False.
model = DistributedDataParallel(network, forward_sync_buffers=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for _ in range(2):
    # Global batches of 8, 8 and 1 samples. Of the last one, every rank but the first has an empty share, and
    # passes it through the model like any other.
    for batch in torch.arange(len(images)).split(8):
        own = batch.tensor_split(world_size)[rank]
        output = model(images[own].to(device))
        # DDP divides the sum of the ranks' gradients by W. A rank's mean loss therefore counts W·n_r/n, with
        # n_r of the n samples; its sum over samples, which is also defined for no samples, counts W/n.
        loss = F.cross_entropy(output, labels[own].to(device), reduction="sum") * world_size / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

if rank == 0:
    torch.save(network.state_dict(), "network.pt")  # keys of nn.BatchNorm2d
dist.destroy_process_group()

"""FSDP2 (`fully_shard`) on a device mesh.

torchrun --nproc-per-node 2 examples/train_fsdp2.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from syncbn import convert_sync_batchnorm

world_size = int(os.environ["WORLD_SIZE"])
device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (world_size,))  # initialises the process group, and chooses the GPU

torch.manual_seed(0)
images, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
).to(device)
convert_sync_batchnorm(model)  # before fully_shard, which makes a subclass of each module's class
for layer in (model[0], model[1], model[4]):
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # after fully_shard, which replaces the parameters

for _ in range(2):
    for batch in torch.arange(len(images)).split(8):
        own = batch.tensor_split(world_size)[mesh.get_rank()]
        loss = F.cross_entropy(model(images[own].to(device)), labels[own].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# Parameters are sharded. Buffers are not: every rank has all of them, and they are equal.
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if dist.get_rank() == 0:
    torch.save(state, "network.pt")
dist.destroy_process_group()

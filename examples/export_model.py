"""Export of a model as a torch program and as ONNX, after training it.

torchrun --nproc-per-node 2 examples/export_model.py
"""

import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from syncbn import convert_sync_batchnorm, revert_sync_batchnorm

gpu = torch.cuda.is_available()
if gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = "cuda" if gpu else "cpu"
dist.init_process_group("nccl" if gpu else "gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
images, labels = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
network = nn.Sequential(
    nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
).to(device)
model = DistributedDataParallel(convert_sync_batchnorm(network), forward_sync_buffers=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
own = torch.arange(8).tensor_split(world_size)[rank]
F.cross_entropy(model(images[own].to(device)), labels[own].to(device)).backward()
optimizer.step()

# Reversal works in place; the copy leaves the model in training as it is.
plain = revert_sync_batchnorm(copy.deepcopy(network)).eval()
if rank == 0:
    example, shapes = (images.to(device),), ({0: torch.export.Dim("batch")},)
    program = torch.export.export(plain, example, dynamic_shapes=shapes)
    torch.export.save(program, "network.pt2")
    torch.onnx.export(plain, example, "network.onnx", dynamo=True, dynamic_shapes=shapes)  # syncbn[onnx]
dist.destroy_process_group()

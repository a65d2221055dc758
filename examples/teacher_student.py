"""A student in training and its teacher, an exponential moving average.

torchrun --nproc-per-node 2 examples/teacher_student.py
"""

import copy
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
x, target = torch.randn(16, 6), torch.randn(16, 2)
network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).to(device)
student = convert_sync_batchnorm(network)
# A copy has other layer names ("1" and "1, copy"), so that calls of the two are never confused. A copy
# gets a number when it is synchronised first.
teacher = copy.deepcopy(student).eval().requires_grad_(False)
names = [student[1].layer_name, teacher[1].layer_name]
model = DistributedDataParallel(student, forward_sync_buffers=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for batch in torch.arange(len(x)).split(8):
    own = batch.tensor_split(world_size)[rank]
    inputs = x[own].to(device)
    output = model(inputs)
    loss = F.mse_loss(output, target[own].to(device)) + F.mse_loss(output, teacher(inputs))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for mine, its in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.lerp_(its, 0.1)
        for mine, its in zip(teacher.buffers(), student.buffers(), strict=True):
            mine.copy_(its)

# In evaluation the teacher needs neither the other ranks nor a process group.
before = teacher(x.to(device)) if rank == 0 else None
dist.destroy_process_group()
after = teacher(x.to(device))

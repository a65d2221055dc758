"""timm: the steps of its training script with `--sync-bn`, with this conversion.

torchrun --nproc-per-node 2 examples/train_timm.py
"""

import os

import torch
import torch.distributed as dist
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
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
images, labels = torch.randn(16, 3, 64, 64), torch.randint(4, (16,))
network = create_model("test_efficientnet", num_classes=4).to(device)
# In place of timm's convert_sync_batchnorm; BatchNormAct2d keeps its activation.
convert_sync_batchnorm(network)
optimizer = create_optimizer_v2(network, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
# A copy in evaluation mode. It averages buffers too, which are equal on all ranks, so its own stay equal, and
# timm's distribute_bn has nothing to do.
ema = ModelEmaV3(network, decay=0.9)
model = DistributedDataParallel(network, forward_sync_buffers=False)

for batch in torch.arange(len(images)).split(8):
    own = batch.tensor_split(world_size)[rank]
    loss = F.cross_entropy(model(images[own].to(device)), labels[own].to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(network)

dist.destroy_process_group()

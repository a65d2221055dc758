"""accelerate: conversion before `prepare`.

torchrun --nproc-per-node 2 examples/train_accelerate.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from syncbn import convert_sync_batchnorm, revert_sync_batchnorm

accelerator = Accelerator(
    cpu=not torch.cuda.is_available(),
    dataloader_config=DataLoaderConfiguration(split_batches=True),  # batch_size is that of all ranks
)
torch.manual_seed(0)
images, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
network = nn.Sequential(
    nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
)
convert_sync_batchnorm(network)  # before prepare, which wraps the model in DistributedDataParallel
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(images, labels), batch_size=8)
model, optimizer, loader = accelerator.prepare(network, optimizer, loader)

for _ in range(2):
    for own_images, own_labels in loader:
        loss = F.cross_entropy(model(own_images), own_labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

network = revert_sync_batchnorm(accelerator.unwrap_model(model))
accelerator.save(network.state_dict(), "network.pt")  # on the main process
accelerator.end_training()

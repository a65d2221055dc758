"""Lightning: a plugin in place of `Trainer(sync_batchnorm=True)`.

torchrun --nproc-per-node 2 examples/train_lightning.py
"""

import os

import pytorch_lightning as lightning
import torch
from pytorch_lightning.plugins import LayerSync
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from syncbn import convert_sync_batchnorm, revert_sync_batchnorm


class SyncBatchNormPlugin(LayerSync):
    """Conversion before the model is wrapped, and reversal after the fit."""

    def apply(self, model: nn.Module) -> nn.Module:
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        return revert_sync_batchnorm(model)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


processes = int(os.environ["LOCAL_WORLD_SIZE"])
torch.manual_seed(0)
images, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
classifier = Classifier()
# Lightning adds a DistributedSampler, which shuffles, and of every 8 samples gives each rank its share.
loader = DataLoader(TensorDataset(images, labels), batch_size=8 // processes)
trainer = lightning.Trainer(
    devices=processes,
    strategy=DDPStrategy(forward_sync_buffers=False),
    plugins=[SyncBatchNormPlugin()],
    max_epochs=2,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(classifier, loader)  # afterwards the layers are nn.BatchNorm2d again

import torch

from tests.trainer.data.image_files import CPU, make_spec
from trainer.data import open_dataset
from trainer.jobspec import SyntheticSpec


def test_synthetic_classes_differ_and_samples_are_reproducible():
    spec = make_spec(
        SyntheticSpec(shape=[50], classes=2, train_samples=20, test_samples=20), global_batch_size=20
    )
    dataset = open_dataset(spec, 0, 1, CPU, torch.float64)
    stream = dataset.train(0)
    first, again = next(stream)[0], next(stream)[0]
    assert torch.equal(first.inputs, again.inputs)
    assert first.inputs.dtype == torch.float64
    tests = torch.cat([batch.inputs for batch in dataset.test()])
    labels = torch.cat([batch.labels for batch in dataset.test()])
    means = torch.stack([first.inputs[first.labels == label].mean(0) for label in range(2)])
    assert (torch.cdist(tests, means).argmin(1) == labels).all()

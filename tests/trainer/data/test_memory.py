import pytest
import torch

from tests.trainer.data.image_files import assert_same, make_spec, open_all, take, take_test
from trainer.data.transforms import normalize
from trainer.errors import ConfigurationError
from trainer.jobspec import DigitsSpec, ImageTransformSpec, SyntheticSpec

AUGMENTED = ImageTransformSpec(
    resize=9,
    crop=8,
    padding=1,
    flip=True,
    color_jitter=0.3,
    auto_augment="randaugment",
    channels=3,
    mean=[0.5],
    std=[0.2],
)


KINDS = [
    DigitsSpec(),
    DigitsSpec(transform=AUGMENTED),
    DigitsSpec(transform=ImageTransformSpec(auto_augment="trivialaugment", random_resized_crop=True, crop=8)),
    SyntheticSpec(shape=[3, 4, 4], classes=5, train_samples=13, test_samples=11),
]


@pytest.mark.parametrize("data", KINDS)
def test_samples_do_not_depend_on_workers_or_resumption(data):
    spec = make_spec(data, gradient_accumulation_steps=2, global_batch_size=10)
    alone = open_all(spec, 1)
    whole, tests = take(alone, 0, 4), take_test(alone)
    for world_size in (2, 3):
        workers = open_all(spec, world_size)
        assert_same(take(workers, 0, 4), whole)
        assert_same(take_test(workers), tests)
        assert_same(take(workers, 2, 2), whole[4:])


@pytest.mark.parametrize("data", KINDS)
def test_loading_does_not_change_the_random_state(data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    datasets = open_all(make_spec(data), 1)
    take(datasets, 0, 2)
    take_test(datasets)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_depends_on_seed_and_step_and_excludes_test_data():
    plain = DigitsSpec(transform=AUGMENTED.model_copy(update={"crop": None, "padding": 0}))
    data = DigitsSpec(transform=ImageTransformSpec(flip=True))
    size = {"global_batch_size": 1_437}
    first, second = (
        inputs[labels.argsort(stable=True)]
        for inputs, labels in take(open_all(make_spec(data, **size), 1), 0, 2)
    )
    flipped = {tuple(image.flatten().tolist()) for image in first} - {
        tuple(image.flatten().tolist()) for image in second
    }
    assert 300 < len(flipped) < 1_100  # about half of them
    other = take(open_all(make_spec(data, seed=1, **size), 1), 0, 1)[0][0]
    assert not torch.equal(other, first)
    untouched = take_test(open_all(make_spec(DigitsSpec()), 1))
    assert_same(take_test(open_all(make_spec(data), 1)), untouched)
    assert take_test(open_all(make_spec(plain), 1))[0][0].shape == (4, 3, 9, 9)


def test_transforms_prepare_digits_for_networks_of_photographs():
    data = DigitsSpec(transform=ImageTransformSpec(resize=32, channels=3, mean=[0.1, 0.2, 0.3], std=[2.0]))
    dataset = open_all(make_spec(data), 1)[0]
    assert dataset.shape == (3, 32, 32)
    [batch] = next(dataset.train(0))
    grey = batch.inputs * 2 + torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    assert (grey - grey[:, :1]).abs().max() < 1e-6
    assert 0 <= grey.min() < grey.max() <= 1


def test_a_mean_for_other_channels_is_refused():
    transform = ImageTransformSpec(mean=[0.1, 0.2, 0.3])
    with pytest.raises(
        ConfigurationError, match=r"data.transform.mean: must be 1 number or one for each of 1 channels"
    ):
        normalize(transform, torch.zeros(2, 1, 4, 4), torch.float32)


@pytest.mark.parametrize(
    "data", [DigitsSpec(), SyntheticSpec(shape=[2], classes=4, train_samples=40, test_samples=4)]
)
def test_by_label_gives_each_worker_some_of_the_classes(data):
    spec = make_spec(data, data_partition="by_label", num_workers=2)
    labels = [
        torch.cat(
            [part.labels for step, parts in zip(range(30), dataset.train(0), strict=False) for part in parts]
        )
        for dataset in open_all(spec, 2)
    ]
    assert labels[0].max() <= labels[1].min()

import pytest
import torch

from tests.trainer.data.image_files import CPU, assert_same, make_spec, open_all, take, take_test
from trainer.data import open_dataset
from trainer.data.cache import CACHE_VERSION
from trainer.data.transforms import normalize
from trainer.errors import ConfigurationError
from trainer.jobspec import DigitsSpec, ImageTransformSpec, Mnist5kSpec, SyntheticSpec, train_samples

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


@pytest.mark.parametrize(
    ("data", "shape", "tests"), [(Mnist5kSpec(), (1, 28, 28), 1_000), (DigitsSpec(), (1, 8, 8), 360)]
)
def test_datasets_are_whole_and_split_by_label(tmp_path, monkeypatch, data, shape, tests):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    samples = train_samples(data)
    spec = make_spec(data, global_batch_size=samples, evaluation={"batch_size": tests})
    first = open_all(spec, 1)
    assert (first[0].shape, first[0].classes, first[0].skipped_images) == (shape, 10, frozenset())
    [(inputs, _)] = take(first, 0, 1)
    [(test_inputs, test_labels)] = take_test(first)
    assert inputs.shape == (samples, *shape)
    assert test_inputs.shape == (tests, *shape)
    assert (inputs.dtype, test_labels.dtype, inputs.min(), inputs.max()) == (torch.float32, torch.int64, 0, 1)
    shares = torch.bincount(test_labels) / tests
    assert (shares - 0.1).abs().max() < 0.005
    again = open_all(spec, 1)
    assert again[0].digest == first[0].digest
    assert open_dataset(spec, 0, 1, CPU, torch.float64).digest == first[0].digest
    assert_same(take(again, 0, 1), [(inputs, take(first, 0, 1)[0][1])])
    assert (tmp_path / "syncbn" / CACHE_VERSION / f"{data.name}.npz").is_file()


def test_mnist5k_is_binary_as_in_the_paper():
    [(inputs, _)] = take(open_all(make_spec(Mnist5kSpec(), global_batch_size=4_000), 1), 0, 1)
    assert inputs.unique().tolist() == [0, 1]


@pytest.mark.parametrize("data", KINDS)
def test_neither_workers_nor_a_resumption_change_a_sample(data):
    spec = make_spec(data, accumulate=2, global_batch_size=10)
    alone = open_all(spec, 1)
    whole, tests = take(alone, 0, 4), take_test(alone)
    for world_size in (2, 3):
        workers = open_all(spec, world_size)
        assert_same(take(workers, 0, 4), whole)
        assert_same(take_test(workers), tests)
        assert_same(take(workers, 2, 2), whole[4:])


@pytest.mark.parametrize("data", KINDS)
def test_loading_leaves_the_random_numbers_of_the_process_alone(data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    datasets = open_all(make_spec(data), 1)
    take(datasets, 0, 2)
    take_test(datasets)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_depends_on_seed_and_step_and_spares_the_test_data():
    plain = DigitsSpec(transform=AUGMENTED.model_copy(update={"crop": None, "padding": 0}))
    data = DigitsSpec(transform=ImageTransformSpec(flip=True))
    size = {"global_batch_size": 1_437}
    first, second = (
        inputs[labels.argsort(stable=True)] for inputs, labels in take(open_all(make_spec(data, **size), 1), 0, 2)
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


@pytest.mark.parametrize("data", [DigitsSpec(), SyntheticSpec(shape=[2], classes=4, train_samples=40, test_samples=4)])
def test_by_label_shows_each_worker_a_part_of_the_classes(data):
    spec = make_spec(data, sharding="by_label", num_workers=2)
    labels = [
        torch.cat([part.labels for step, parts in zip(range(30), dataset.train(0), strict=False) for part in parts])
        for dataset in open_all(spec, 2)
    ]
    assert labels[0].max() <= labels[1].min()


def test_synthetic_classes_differ_and_samples_come_again_at_their_index():
    spec = make_spec(SyntheticSpec(shape=[50], classes=2, train_samples=20, test_samples=20), global_batch_size=20)
    dataset = open_dataset(spec, 0, 1, CPU, torch.float64)
    stream = dataset.train(0)
    first, again = next(stream)[0], next(stream)[0]
    assert torch.equal(first.inputs, again.inputs)
    assert first.inputs.dtype == torch.float64
    tests = torch.cat([batch.inputs for batch in dataset.test()])
    labels = torch.cat([batch.labels for batch in dataset.test()])
    means = torch.stack([first.inputs[first.labels == label].mean(0) for label in range(2)])
    assert (torch.cdist(tests, means).argmin(1) == labels).all()

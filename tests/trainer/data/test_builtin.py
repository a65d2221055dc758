import pytest
import torch

from tests.trainer.data.image_files import CPU, assert_same, make_spec, open_all, take, take_test
from trainer.data import open_dataset
from trainer.data.cache import CACHE_VERSION
from trainer.jobspec import DigitsSpec, Mnist5kSpec, train_samples


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

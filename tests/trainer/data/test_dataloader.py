import numpy as np
import psutil
import pytest
import torch

from tests.trainer.data.image_files import assert_same, make_spec, take, take_test
from tests.trainer.data.image_folders import folder, open_here
from trainer.data.dataloader import BatchRequest, ImageReader, count_processes
from trainer.data.folders import open_folders
from trainer.jobspec import ImageTransformSpec

AUGMENTED = ImageTransformSpec(resize=9, crop=8, flip=True, color_jitter=0.3, auto_augment="trivialaugment")


def test_samples_do_not_depend_on_workers_processes_or_resumption(root):
    """Also in loader processes, which do not use this random state and end with the dataset."""
    spec = make_spec(folder(root, transform=AUGMENTED), gradient_accumulation_steps=2, global_batch_size=7)
    whole, tests = take(open_here(spec), 0, 4), take_test(open_here(spec))
    assert_same(take(open_here(spec, 3), 0, 4), whole)
    assert_same(take_test(open_here(spec, 3)), tests)
    before = torch.get_rng_state(), set(psutil.Process().children())
    [loaded] = open_here(spec, processes=1)
    stream = loaded.train(2)
    parts = [part for _ in range(2) for part in next(stream)]
    assert_same([(part.inputs, part.labels) for part in parts], whole[4:])
    assert_same(take_test([loaded]), tests)
    assert_same(take_test([loaded]), tests)
    assert torch.equal(torch.get_rng_state(), before[0])
    new = [
        child
        for child in psutil.Process().children()
        if child not in before[1] and "spawn_main" in str(child.cmdline())
    ]
    assert len(new) == 2
    loaded.close()
    gone, alive = psutil.wait_procs(new, timeout=20)
    assert len(gone) == 2, alive


def test_augmentation_differs_between_steps(root):
    spec = make_spec(folder(root, transform=ImageTransformSpec(crop=4)), global_batch_size=10)
    [(first, first_labels), (second, second_labels)] = take(open_here(spec), 0, 2)
    images = [{tuple(image.flatten().tolist()) for image in step} for step in (first, second)]
    assert len(images[0] & images[1]) < 5
    assert first_labels.sum() == second_labels.sum() == 5


def test_workers_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    assert [count_processes(workers) for workers in (1, 2, 3, 12, 100)] == [8, 6, 4, 1, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert count_processes(100) == 3


@pytest.mark.parametrize("in_process", [True, False])
def test_a_loader_process_reads_into_shared_memory(root, monkeypatch, in_process):
    """A process that ends while a thread copies a tensor aborts, with a message in the log."""
    data = folder(root)
    reader = ImageReader(open_folders(data), data, 0, None)
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: object() if in_process else None)
    loaded = reader[BatchRequest(0, np.array([0, 1]))]
    assert (loaded.images.is_shared(), loaded.labels.is_shared()) == (in_process, in_process)

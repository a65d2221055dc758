import json
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests.trainer.data.image_files import CPU, assert_same, make_spec, take, take_test, write_images
from tests.trainer.factories import here
from trainer.data.dataloader import ImageDataset, Reader, Request, count_processes
from trainer.data.folders import open_folders
from trainer.errors import ConfigurationError, DataError
from trainer.jobspec import ImageFolderSpec, ImageTransformSpec
from trainer.tracking.outbox import Outbox, read_lines
from trainer.worker import describe

AUGMENTED = ImageTransformSpec(resize=9, crop=8, flip=True, color_jitter=0.3, auto_augment="trivialaugment")


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path / "data")


def open_here(spec, world_size=1, processes=0):
    return [
        ImageDataset(spec, spec.data, open_folders(spec.data), rank, world_size, CPU, torch.float32, processes)
        for rank in range(world_size)
    ]


def folder(root, **changes):
    return ImageFolderSpec(root=str(root), **changes)


def test_images_come_with_the_class_of_their_folder(root):
    [dataset] = open_here(make_spec(folder(root), global_batch_size=10))
    assert (dataset.shape, dataset.classes, dataset.skipped_images) == ((3, 10, 12), 2, frozenset())
    [(inputs, labels)] = take([dataset], 0, 1)
    expected = {}
    for number, name in enumerate(["cat", "dog"]):
        for path in (root / "train" / name).iterdir():
            expected[np.asarray(Image.open(path)).tobytes()] = number
    for image, label in zip(inputs, labels.tolist(), strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        assert expected.pop(pixels.numpy().tobytes()) == label
    assert not expected
    assert torch.cat([labels for _, labels in take_test([dataset])]).tolist() == [0, 0, 0, 1, 1, 1]


def test_a_folder_of_one_class_is_refused(root):
    for part in ("train", "val"):
        shutil.rmtree(root / part / "dog")
    with pytest.raises(DataError, match=r"data.root: must hold two classes or more below 'train'; there is one"):
        open_here(make_spec(folder(root)))


def test_neither_workers_processes_nor_a_resumption_change_a_sample(root):
    """In loader processes as in this one, which keep off the random numbers of this one, and end with the dataset."""
    spec = make_spec(folder(root, transform=AUGMENTED), accumulate=2, global_batch_size=7)
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


def test_by_label_shows_each_worker_a_class_of_its_own(root):
    spec = make_spec(folder(root), sharding="by_label", num_workers=2)
    shares = [[next(stream) for _ in range(3)] for stream in (dataset.train(0) for dataset in open_here(spec, 2))]
    assert [{label for step in steps for part in step for label in part.labels.tolist()} for steps in shares] == [
        {0},
        {1},
    ]


def test_the_fingerprint_is_that_of_the_images_wherever_they_are(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy")
    first = open_folders(folder(root)).digest
    assert open_folders(folder(tmp_path / "copy")).digest == first
    (tmp_path / "copy" / "train" / "cat" / "1.png").unlink()
    assert open_folders(folder(tmp_path / "copy")).digest != first


def test_images_of_several_sizes_take_a_crop(root):
    Image.new("L", (30, 30)).save(root / "train" / "cat" / "wide.png")
    [dataset] = open_here(make_spec(folder(root), global_batch_size=11))
    with pytest.raises(DataError, match=r"data.transform.crop.*wide.png makes \(3, 30, 30\), others \(3, 10, 12\)"):
        next(dataset.train(0))
    [dataset] = open_here(make_spec(folder(root, transform=ImageTransformSpec(crop=16)), global_batch_size=11))
    assert next(dataset.train(0))[0].inputs.shape == (11, 3, 16, 16)


def remove(path):
    shutil.rmtree(path)


def move_out(path):
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")


def empty(path):
    for image in path.iterdir():
        image.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: remove(root), "data.root: must be a folder that contains 'train'"),
        (lambda root: remove(root / "val"), "data.root: must be a folder that contains 'val'"),
        (
            lambda root: [remove(root / "val" / name) for name in ("cat", "dog")],
            "must contain a folder of images per class",
        ),
        (lambda root: empty(root / "train" / "dog"), "must have images in every class; there are none in dog"),
        (
            lambda root: remove(root / "train" / "dog"),
            "data.test_folder: must have the classes of 'train'; not among them: dog",
        ),
        (lambda root: (root / "train" / "cat" / "x.png").symlink_to("gone"), "must be a link to a file.*cat/x.png"),
        (lambda root: (root / "train" / "fox").symlink_to("gone"), "must be a link to a file that exists.*train/fox"),
        (lambda root: (root / "train" / "fox").symlink_to("fox"), "must be a link to a file that exists.*train/fox"),
        (
            lambda root: (root / "train" / "cat" / "x.png").symlink_to("/etc/hosts"),
            "must contain only links that stay below",
        ),
        (lambda root: move_out(root / "val"), "must contain only links that stay below"),
        (lambda root: (root / "train" / "fox").symlink_to("/etc"), "must contain only links that stay below"),
        (lambda root: (root / "train" / "cat" / "loop").symlink_to(root / "train"), "do not lead in a circle"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(root, spoil, message):
    spoil(root)
    with pytest.raises(DataError, match=message):
        open_folders(folder(root))


def test_hidden_and_system_folders_and_files_are_ignored(root):
    before = open_folders(folder(root))
    for path in (".ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "cat/.hidden/0.png", "cat/._0.png", "@eaDir/0.png"):
        for part in ("train", "val"):
            (root / part / path).parent.mkdir(parents=True, exist_ok=True)
            (root / part / path).write_bytes(b"no image")
    (root / "train" / ".link").symlink_to("gone")
    after = open_folders(folder(root))
    assert (after.classes, after.class_names, after.digest) == (2, ["cat", "dog"], before.digest)


def test_classes_are_listed_in_the_log_and_in_mlflow(root, tmp_path, capsys):
    spec = make_spec(folder(root))
    [dataset] = open_here(spec)
    outbox = Outbox(tmp_path)
    describe(outbox, spec, here(), dataset, tmp_path)
    outbox.close()
    assert "2 classes, in the order of their labels: cat, dog" in capsys.readouterr().out
    [line] = [line for line in read_lines(outbox.path.read_bytes()) if line["kind"] == "artifact"]
    assert json.loads(Path(line["path"]).read_text()) == ["cat", "dog"]


def test_the_suffixes_of_images_are_listed_where_a_class_has_none(root):
    for path in (root / "train" / "dog").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"none in dog. They end in .*\.gif, .*\.jpg"):
        open_folders(folder(root))


def test_links_within_the_root_are_followed(root):
    (root / "train" / "cat" / "again.png").symlink_to(root / "val" / "cat" / "0.png")
    assert len(open_folders(folder(root)).training) == 11


def test_a_batch_larger_than_the_data_is_refused(root):
    with pytest.raises(ConfigurationError, match="global_batch_size: must be at most 10"):
        open_here(make_spec(folder(root), global_batch_size=11))


def test_workers_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    assert [count_processes(workers) for workers in (1, 2, 3, 12, 100)] == [8, 6, 4, 1, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert count_processes(100) == 3


@pytest.mark.parametrize("in_process", [True, False])
def test_a_loader_process_reads_into_memory_that_it_shares(root, monkeypatch, in_process):
    """A process that ends while its sending thread copies a tensor is aborted, and says so in the job's log."""
    data = folder(root)
    reader = Reader(open_folders(data), data, 0, None)
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: object() if in_process else None)
    loaded = reader[Request(0, np.array([0, 1]))]
    assert (loaded.images.is_shared(), loaded.labels.is_shared()) == (in_process, in_process)

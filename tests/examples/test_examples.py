"""The examples on two ranks, compared with plain batch normalisation in one process on whole batches."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
RANKS = 2
MAX_SECONDS = 90


def run(example, folder, *expressions):
    """Run an example under torchrun, and return each rank's values of expressions over its variables."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    address = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    program = [Path(__file__).with_name("run_example.py"), ROOT / "examples" / example, *expressions]
    environment = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "CUDA_VISIBLE_DEVICES": "",  # the CPU, also where there are fewer GPUs than ranks
        "SYNCBN_TIMEOUT_SECONDS": "30",
    }
    launched = subprocess.Popen(
        [*launcher, *address, *program],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = launched.communicate(timeout=MAX_SECONDS)
    except BaseException:
        launched.terminate()  # torchrun then ends the ranks too
        launched.communicate(timeout=MAX_SECONDS)
        raise
    assert launched.returncode == 0, errors
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]


def equal_on_all_ranks(values):
    """Return the value that all ranks have, the same bits."""
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=0)
    return values[0]


def train_images(samples, orders):
    """Return the state of the convolutional network of the examples after an epoch of each order."""
    torch.manual_seed(0)
    images, labels = torch.randn(samples, 3, 8, 8), torch.randint(4, (samples,))
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for order in orders:
        for batch in order.split(8):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network.state_dict()


def assert_equals_one_process(state, samples, orders=None):
    expected = train_images(samples, orders or [torch.arange(samples)] * 2)
    torch.testing.assert_close(dict(state), dict(expected), rtol=1e-5, atol=1e-5)


def make_vectors(samples):
    """Return the data, the network and the optimizer of the other examples."""
    torch.manual_seed(0)
    x, target = torch.randn(samples, 6), torch.randn(samples, 2)
    network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    return x, target, network, torch.optim.SGD(network.parameters(), lr=0.1)


def test_ddp_equals_one_process_although_one_rank_has_no_sample_of_the_last_batch(tmp_path):
    [state] = equal_on_all_ranks(run("train_ddp.py", tmp_path, "network.state_dict()"))
    assert_equals_one_process(state, samples=17)
    torch.testing.assert_close(torch.load(tmp_path / "network.pt"), state, rtol=0, atol=0)


@pytest.mark.slow
def test_fsdp2_equals_one_process(tmp_path):
    [state] = equal_on_all_ranks(run("train_fsdp2.py", tmp_path, "state"))
    assert_equals_one_process(state, samples=16)


@pytest.mark.slow
def test_lightning_equals_one_process_and_reverts_the_layers(tmp_path):
    pytest.importorskip("pytorch_lightning")
    expressions = ["classifier.network.state_dict()", "type(classifier.network[1]) is nn.BatchNorm2d"]
    state, reverted = equal_on_all_ranks(run("train_lightning.py", tmp_path, *expressions))
    # The DistributedSampler that Lightning adds shuffles with the epoch as its seed.
    orders = [torch.randperm(16, generator=torch.Generator().manual_seed(epoch)) for epoch in range(2)]
    assert_equals_one_process(state, samples=16, orders=orders)
    assert reverted


@pytest.mark.slow
def test_accelerate_equals_one_process(tmp_path):
    pytest.importorskip("accelerate")
    [state] = equal_on_all_ranks(run("train_accelerate.py", tmp_path, "network.state_dict()"))
    assert_equals_one_process(state, samples=16)


@pytest.mark.slow
def test_a_timm_model_and_its_average_equal_those_of_one_process(tmp_path):
    from timm import create_model
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    expressions = ["network.state_dict()", "ema.module.state_dict()"]
    actual = equal_on_all_ranks(run("train_timm.py", tmp_path, *expressions))
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(4, (16,))
    network = create_model("test_efficientnet", num_classes=4)
    optimizer = create_optimizer_v2(network, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
    ema = ModelEmaV3(network, decay=0.9)
    for batch in torch.arange(16).split(8):
        optimizer.zero_grad()
        F.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
        ema.update(network)
    expected = [network.state_dict(), ema.module.state_dict()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_running_statistics_of_averaged_weights_are_those_of_all_ranks(tmp_path):
    expressions = ["averaged.module.state_dict()", "precise.module.state_dict()"]
    averaged, precise = equal_on_all_ranks(run("average_weights.py", tmp_path, *expressions))
    x, target, network, optimizer = make_vectors(20)
    parameters = []
    for batch in torch.arange(20).split(8):
        optimizer.zero_grad()
        F.mse_loss(network(x[batch]), target[batch]).backward()
        optimizer.step()
        parameters.append(copy.deepcopy(dict(network.named_parameters())))
    expected = {name: sum(step[name] for step in parameters) / len(parameters) for name in parameters[0]}
    for state in (averaged, precise):
        torch.testing.assert_close({name: state[name] for name in expected}, expected, rtol=1e-5, atol=1e-5)
    hidden = F.linear(x, averaged["0.weight"], averaged["0.bias"]).split(8)  # (8, 16), (8, 16), (4, 16)
    means, variances = (
        torch.stack([measure(part, 0) for part in hidden]) for measure in (torch.mean, torch.var)
    )
    for state, weights in (
        (averaged, torch.ones(3, 1) / 3),
        (precise, torch.tensor([[8.0], [8.0], [4.0]]) / 20),
    ):
        assert state["1.num_batches_tracked"] == 3
        torch.testing.assert_close(state["1.running_mean"], (weights * means).sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state["1.running_var"], (weights * variances).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_teacher_has_its_own_layer_names_and_evaluates_without_a_group(tmp_path):
    expressions = [
        "names == ['1', '1, copy']",
        "student.state_dict()",
        "teacher.state_dict()",
        "after",
        "before",
    ]
    ranks = run("teacher_student.py", tmp_path, *expressions)
    named, student, teacher, after = equal_on_all_ranks([values[:-1] for values in ranks])
    assert named
    torch.testing.assert_close(ranks[0][-1], after, rtol=0, atol=0)  # rank 0 alone evaluated it before
    x, target, network, optimizer = make_vectors(16)
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    for batch in torch.arange(16).split(8):
        optimizer.zero_grad()
        y = network(x[batch])
        (F.mse_loss(y, target[batch]) + F.mse_loss(y, copied(x[batch]))).backward()
        optimizer.step()
        with torch.no_grad():
            for mine, its in zip(copied.parameters(), network.parameters(), strict=True):
                mine.lerp_(its, 0.1)
            for mine, its in zip(copied.buffers(), network.buffers(), strict=True):
                mine.copy_(its)
    expected = [network.state_dict(), copied.state_dict()]
    torch.testing.assert_close([student, teacher], expected, rtol=1e-5, atol=1e-5)


def test_the_exported_programs_evaluate_as_the_trained_model_does(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    expressions = [
        "type(plain[1]) is nn.BatchNorm2d and type(network[1]) is not nn.BatchNorm2d",
        "plain.state_dict()",
        "network.eval()(images).detach()",
        "images",
    ]
    only_the_copy_is_reverted, state, expected, images = equal_on_all_ranks(
        run("export_model.py", tmp_path, *expressions)
    )
    assert only_the_copy_is_reverted
    assert state["1.num_batches_tracked"] == 1
    for samples in (8, 3):  # batches of any size
        x, y = images[:samples], expected[:samples]
        program = torch.export.load(tmp_path / "network.pt2")
        torch.testing.assert_close(program.module()(x), y, rtol=1e-5, atol=1e-5)
        model = onnx.load(tmp_path / "network.onnx")
        [output] = onnx.reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), y, rtol=1e-4, atol=1e-5)

"""Checks of specs in a separate process, as the service requests them."""

import asyncio
import sys
import time
from contextlib import suppress

import psutil
import pytest

from service.adapters.spec_checker import SpecChecker
from service.local.host import choose_ports
from trainer.jobspec import InvalidField, JobSpec, Norm


def checkers():
    """Processes that check specs."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "trainer.check" in child.cmdline():
                found.append(child)
    return found


def spec(model=None, **changes):
    return JobSpec.model_validate({"steps": 1} | ({"model": model} if model else {}) | changes)


@pytest.fixture
async def checker():
    checker = SpecChecker(60)
    yield checker
    await checker.close()


async def test_names_and_arguments_are_checked_against_the_libraries(checker, monkeypatch):
    monkeypatch.setenv("SYNCBN_TOKEN", "a secret of the service")
    for model, field, message in [
        ({"name": "timm:resnet266"}, "spec.model.name", r"must be a model of timm; similar names: resnet26"),
        ({"name": "torchvision:resnet19"}, "spec.model.name", r"resnet18"),
        (
            {"name": "timm:resnet26", "arguments": {"junk": 1}},
            "spec.model.arguments",
            "unexpected keyword argument 'junk'",
        ),
        (
            {"name": "torchvision:resnet18", "arguments": {"x": 1}},
            "spec.model.arguments",
            "unexpected keyword argument 'x'",
        ),
        ({"name": "import:nowhere:build"}, "spec.model.name", "there is no nowhere"),
        (
            {"name": "import:tests.trainer.networks:nothing"},
            "spec.model.name",
            "must be a function in tests.trainer.networks",
        ),
        (
            {"name": "import:tests.trainer.networks:slow", "arguments": {"x": 1}},
            "spec.model.arguments",
            "'x'",
        ),
    ]:
        with pytest.raises(InvalidField, match=message) as refused:
            await checker.check([spec(model)])
        assert refused.value.field == field
    for data, field, message in [
        ({"name": "torchvision:CIFAR11"}, "spec.data.name", "CIFAR10"),
        ({"name": "torchvision:EuroSAT"}, "spec.data.name", "EuroSAT has no such parts"),
        ({"name": "torchvision:EMNIST"}, "spec.data.split", "must be one of balanced"),
        ({"name": "torchvision:EMNIST", "split": "small"}, "spec.data.split", "must be one of balanced"),
        (
            {"name": "torchvision:CIFAR10", "root": None},
            "spec.data.root",
            "must be the folder with the files of torchvision:CIFAR10",
        ),
    ]:
        with pytest.raises(InvalidField, match=message) as refused:
            await checker.check([spec(data={"root": "/nowhere"} | data)])
        assert refused.value.field == field
    await checker.check([spec(data={"name": "torchvision:EMNIST", "split": "balanced", "root": "/nowhere"})])
    adam = {"name": "torch:Adam", "arguments": {"betas": [2, 3]}}
    with pytest.raises(InvalidField, match="Invalid beta parameter") as refused:
        await checker.check([spec(optimizer=adam)])
    assert refused.value.field == "spec.optimizer.arguments"
    await checker.check([spec(optimizer=adam | {"arguments": {"betas": [0.8, 0.9]}})])
    for model in (
        "timm:resnet26",
        "timm:vit_tiny_patch16_224",
        "torchvision:googlenet",
        "timm:convnext_tiny",
    ):
        await checker.check([spec({"name": model})])
    began = time.monotonic()
    await checker.check([spec({"name": "timm:resnet26"})])  # cached by now
    assert time.monotonic() - began < 0.01
    (process,) = checkers()
    assert "SYNCBN_TOKEN" not in process.environ()
    await checker.close()
    assert not process.is_running()


async def test_sizes_of_library_models_are_measured(checker):
    data = {"name": "imagefolder", "root": "/x", "transform": {"crop": 224}}
    resnet = spec({"name": "torchvision:resnet50"}, data=data)
    sizes = await checker.check([spec(), resnet, resnet.model_copy(update={"norm": Norm.NONE})])
    assert sizes[0] is None
    assert sizes[1].parameters == pytest.approx(
        25.6e6 - 990 * 2_049, rel=0.002
    )  # of 1,000 classes; those of a folder count as 10
    assert sizes[1].sample_activations * 4 == pytest.approx(83.7e6, rel=0.001)
    assert sizes[2].sample_activations < 0.5 * sizes[1].sample_activations
    unknown = spec({"name": "torchvision:resnet50"}, data={"name": "torchvision:CIFAR10", "root": "/x"})
    assert (await checker.check([unknown]))[0].sample_activations == 0  # the size of its images is unknown


async def test_specs_that_need_no_check_start_no_process(checker):
    await checker.check([spec()])
    await checker.check([spec({"name": "cnn"}, data={"name": "synthetic", "shape": [3, 8, 8], "classes": 2})])
    assert checkers() == []


@pytest.mark.parametrize("kind", ["slow", "dead"])
async def test_a_check_that_times_out_is_skipped(tmp_path, monkeypatch, caplog, kind):
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "check.py").write_text(
        "import time; time.sleep(60)" if kind == "slow" else "raise SystemExit(3)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    checker = SpecChecker(1)
    began = time.monotonic()
    await checker.check([spec({"name": "timm:resnet266"})])
    assert time.monotonic() - began < 2
    assert "a spec was not checked" in caplog.text
    await checker.close()
    await asyncio.sleep(0.1)
    assert checkers() == []


async def test_checks_can_be_disabled(monkeypatch):
    checker = SpecChecker(0)
    await checker.check([spec({"name": "timm:resnet266"})])
    assert checkers() == []


async def test_arguments_that_exhaust_memory_end_only_the_check(checker):
    await checker.check([spec({"name": "timm:vit_tiny_patch16_224", "arguments": {"depth": 4_000_000_000}})])
    with pytest.raises(InvalidField, match="resnet26"):
        await checker.check([spec({"name": "timm:resnet266"})])


async def test_one_time_limit_holds_for_all_specs_of_a_request(tmp_path, monkeypatch):
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "check.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    checker = SpecChecker(1)
    began = time.monotonic()
    for _ in range(3):  # a timed-out check is not repeated for some time
        await checker.check([spec({"name": f"timm:resnet{number}"}) for number in range(8)][:1])
    await checker.check([spec({"name": f"timm:resnet{number}"}) for number in range(8)])
    assert time.monotonic() - began < 3
    await checker.close()


@pytest.fixture
async def address():
    """Address of `python -m trainer.check --listen`."""
    [port] = choose_ports(1)
    command = [sys.executable, "-m", "trainer.check", "--listen", f"127.0.0.1:{port}"]
    process = await asyncio.create_subprocess_exec(*command)
    yield "127.0.0.1", port
    children = psutil.Process(process.pid).children()
    process.kill()
    await process.wait()
    assert psutil.wait_procs(children, timeout=10)[1] == []  # they ended with their connections


async def test_a_process_elsewhere_checks_specs(address):
    checker = SpecChecker(60, address)
    async with asyncio.timeout(30):
        while not await can_connect(address):
            await asyncio.sleep(0.1)
    for _ in range(2):
        with pytest.raises(InvalidField, match="similar names: resnet26"):
            await checker.check([spec({"name": "timm:resnet266"})])
        [size] = await checker.check([spec({"name": "torchvision:resnet18"})])
        assert size.parameters > 11e6
        await checker.close()  # the next check connects again
    assert len(checkers()) == 1  # the listening one: the client started none


async def test_a_checker_that_cannot_be_reached_is_skipped(caplog):
    [port] = choose_ports(1)
    checker = SpecChecker(3, ("127.0.0.1", port))
    assert await checker.check([spec({"name": "timm:resnet266"})]) == [None]
    assert "a spec was not checked" in caplog.text
    await checker.close()


async def can_connect(address):
    with suppress(OSError):
        _, writer = await asyncio.open_connection(*address)
        writer.close()
        await writer.wait_closed()
        return True
    return False

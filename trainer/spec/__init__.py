"""JobSpec and the files of a run: the contract between the service and the trainer. Imports neither torch, ray nor mlflow."""

from trainer.spec.base import Frozen
from trainer.spec.data import (
    DataSpec,
    DigitsSpec,
    ImageFolderSpec,
    ImageTransformSpec,
    Mnist5kSpec,
    RayDataSpec,
    SyntheticSpec,
    TorchvisionDataSpec,
    train_samples,
)
from trainer.spec.evaluation import CheckpointSpec, EarlyStopSpec, EvaluationSpec, Measured, Metric
from trainer.spec.job import SHAPING_FIELDS, JobSpec, Norm
from trainer.spec.models import CnnSpec, ImportedModelSpec, LibraryModelSpec, MlpSpec, ModelSpec
from trainer.spec.optimizers import (
    AdamWSpec,
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    OptimizerSpec,
    ScheduleSpec,
    SgdSpec,
    StepSchedule,
    TorchOptimizerSpec,
)
from trainer.spec.paths import field_path
from trainer.spec.permissions import Permissions, Refusal
from trainer.spec.probes import ProbesSpec
from trainer.spec.run import (
    CLOSED_FILE,
    DRIVER_FILE,
    JOB_VARIABLE,
    LOG_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    Cause,
    Outcome,
    Progress,
    RunContext,
    Task,
    attempt_folder,
)
from trainer.spec.yaml import read_yaml

__all__ = [
    "CLOSED_FILE",
    "DRIVER_FILE",
    "JOB_VARIABLE",
    "LOG_FILE",
    "OUTCOME_FILE",
    "PROGRESS_FILE",
    "SHAPING_FIELDS",
    "AdamWSpec",
    "Cause",
    "CheckpointSpec",
    "CnnSpec",
    "ConstantSchedule",
    "CosineSchedule",
    "DataSpec",
    "DigitsSpec",
    "EarlyStopSpec",
    "EvaluationSpec",
    "ExponentialSchedule",
    "Frozen",
    "ImageFolderSpec",
    "ImageTransformSpec",
    "ImportedModelSpec",
    "JobSpec",
    "LibraryModelSpec",
    "Measured",
    "Metric",
    "MlpSpec",
    "Mnist5kSpec",
    "ModelSpec",
    "Norm",
    "OptimizerSpec",
    "Outcome",
    "Permissions",
    "ProbesSpec",
    "Progress",
    "RayDataSpec",
    "Refusal",
    "RunContext",
    "ScheduleSpec",
    "SgdSpec",
    "StepSchedule",
    "SyntheticSpec",
    "Task",
    "TorchOptimizerSpec",
    "TorchvisionDataSpec",
    "attempt_folder",
    "field_path",
    "read_yaml",
    "train_samples",
]

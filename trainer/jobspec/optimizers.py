"""Specifications of optimizers and learning rate schedules."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, ValidationInfo, field_validator

from trainer.jobspec.base import Arguments, FrozenModel, kind_of

TORCH_OPTIMIZERS: dict[str, frozenset[str]] = {
    "ASGD": frozenset({"lambd", "alpha", "t0", "maximize", "foreach"}),
    "Adadelta": frozenset({"rho", "eps", "maximize", "foreach"}),
    "Adafactor": frozenset({"beta2_decay", "eps", "d", "maximize", "foreach"}),
    "Adagrad": frozenset({"lr_decay", "initial_accumulator_value", "eps", "maximize", "foreach", "fused"}),
    "Adam": frozenset({"betas", "eps", "amsgrad", "decoupled_weight_decay", "maximize", "foreach", "fused"}),
    "AdamW": frozenset({"betas", "eps", "amsgrad", "maximize", "foreach", "fused"}),
    "Adamax": frozenset({"betas", "eps", "maximize", "foreach"}),
    "NAdam": frozenset({"betas", "eps", "momentum_decay", "decoupled_weight_decay", "maximize", "foreach"}),
    "RAdam": frozenset({"betas", "eps", "decoupled_weight_decay", "maximize", "foreach"}),
    "RMSprop": frozenset({"alpha", "eps", "momentum", "centered", "maximize", "foreach"}),
    "SGD": frozenset({"momentum", "dampening", "nesterov", "maximize", "foreach", "fused"}),
}
"""Classes of torch.optim and their arguments, without `lr` and `weight_decay`; a test compares them with
torch.

Not included: LBFGS needs a closure, SparseAdam sparse gradients, Muon a network of only matrices, and Rprop
the whole dataset as one batch.
"""

LearningRate = Annotated[float, Field(gt=0, le=1e6, description="learning rate")]
WeightDecay = Annotated[
    float,
    Field(ge=0, le=1e3, description="weight decay; norm parameters and biases decay only with `decay_all`"),
]
DecayAll = Annotated[bool, Field(description="whether norm parameters and biases decay too")]


class SgdSpec(FrozenModel):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    lr: LearningRate = 0.1
    momentum: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: WeightDecay = 0.0
    decay_all: DecayAll = False

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("must be used with a momentum above 0")
        return nesterov


class AdamWSpec(FrozenModel):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    lr: LearningRate = 1e-3
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999]
    )
    eps: float = Field(1e-8, gt=0, le=1)
    weight_decay: WeightDecay = 0.01
    decay_all: DecayAll = False


class TorchOptimizerSpec(FrozenModel):
    """Optimizer of torch.optim, by class name."""

    name: Annotated[str, Field(pattern=r"^torch:[A-Za-z]+$", max_length=60)] = Field(
        description="`torch:RMSprop`, `torch:NAdam` …"
    )
    lr: LearningRate = 1e-3
    weight_decay: WeightDecay = 0.0
    decay_all: DecayAll = False
    arguments: Arguments = Field({}, validate_default=True, description="further arguments of the class")

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name.removeprefix("torch:") not in TORCH_OPTIMIZERS:
            raise ValueError(f"must be torch: and one of {', '.join(TORCH_OPTIMIZERS)}")
        return name

    @field_validator("arguments")
    @classmethod
    def _are_known(cls, arguments: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        # Unknown if the name is invalid itself; its error is enough.
        known = TORCH_OPTIMIZERS.get(str(info.data.get("name")).removeprefix("torch:"))
        if known is not None and arguments.keys() - known:
            raise ValueError(
                f"must be among {', '.join(sorted(known))} for {info.data['name']} "
                f"(got {', '.join(sorted(arguments.keys() - known))})"
            )
        # The combinations below are rejected by torch only when the optimizer is built, after the job has
        # waited.
        if arguments.get("fused") and arguments.get("foreach"):
            raise ValueError("fused must be false together with foreach (got true)")
        momentum, dampening = arguments.get("momentum") or 0, arguments.get("dampening") or 0
        if arguments.get("nesterov") and (not momentum or dampening):
            given = f"momentum {momentum}, dampening {dampening}"
            raise ValueError(f"nesterov must have a momentum above 0 and no dampening (got {given})")
        return arguments

    @property
    def can_be_sharded(self) -> bool:
        """Whether torch supports the optimizer on sharded parameters; a test checks it."""
        name, is_fused = self.name.removeprefix("torch:"), bool(self.arguments.get("fused"))
        return name != "Adafactor" and not (is_fused and name in ("Adagrad", "SGD"))


def _kind(value: Any) -> str | None:
    return kind_of(value, default="sgd")


OptimizerSpec = Annotated[
    Annotated[SgdSpec, Tag("sgd")]
    | Annotated[AdamWSpec, Tag("adamw")]
    | Annotated[TorchOptimizerSpec, Tag("torch")],
    Discriminator(
        _kind,
        custom_error_type="optimizer_name",
        custom_error_message="name must be sgd, adamw or torch:<class of torch.optim>",
    ),
]


class _Schedule(FrozenModel):
    warmup_steps: int = Field(
        0, ge=0, le=100_000_000, description="steps of the linear warm-up of the learning rate"
    )
    warmup_factor: float = Field(
        0.0, ge=0, le=1, description="share of the learning rate at the first step of the warm-up"
    )


class ConstantSchedule(_Schedule):
    """Constant learning rate."""

    name: Literal["constant"] = "constant"


class StepSchedule(_Schedule):
    """Learning rate that is multiplied by `factor` at each of `steps`."""

    name: Literal["step"]
    steps: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=1_000)] = Field(
        description="steps at which the rate changes, ascending"
    )
    factor: float = Field(0.1, gt=0, le=1)

    @field_validator("steps")
    @classmethod
    def _ascend(cls, steps: list[int]) -> list[int]:
        if steps != sorted(set(steps)):
            raise ValueError(f"must be ascending steps (got {steps})")
        return steps


class ExponentialSchedule(_Schedule):
    """Learning rate factor^(step/every), which falls by `factor` in `every` steps."""

    name: Literal["exponential"]
    factor: float = Field(gt=0, le=1)
    every: int = Field(
        1, ge=1, le=100_000_000, description="steps in which the learning rate falls by `factor`"
    )


class CosineSchedule(_Schedule):
    """Learning rate along half a cosine, down to `final_factor` at the last step.

    Source: Loshchilov & Hutter 2017.
    """

    name: Literal["cosine"]
    final_factor: float = Field(0.0, ge=0, le=1)


ScheduleSpec = Annotated[
    ConstantSchedule | StepSchedule | ExponentialSchedule | CosineSchedule, Field(discriminator="name")
]


def depends_on_steps(spec: ScheduleSpec) -> bool:
    """Return whether a schedule depends on the run's number of steps."""
    return isinstance(spec, CosineSchedule)

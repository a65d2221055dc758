"""Specifications of models, including section 4.2.1 of Ioffe & Szegedy 2015."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator

from trainer.jobspec.base import Arguments, FrozenModel, kind_of

Activation = Literal["sigmoid", "tanh", "relu", "gelu", "silu"]
Width = Annotated[int, Field(ge=1, le=65_536)]

LOADING_ARGUMENTS = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "norm_layer",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_strict",
        "progress",
        "scriptable",
        "weights",
        "weights_backbone",
    }
)
"""Arguments of library builders that read files or the network, or that `norm` determines."""
OWN_ARGUMENTS = frozenset({"num_classes", "in_chans", "aux_logits"})
"""Arguments of library builders that the trainer sets itself."""


class MlpSpec(FrozenModel):
    """Fully connected network; by default that of Ioffe & Szegedy 2015, Figure 1."""

    name: Literal["mlp"] = "mlp"
    hidden: Annotated[list[Width], Field(min_length=1, max_length=64)] = Field(
        [100, 100, 100], description="width of each hidden layer"
    )
    activation: Activation = Field("sigmoid", description="nonlinearity after each hidden layer")
    init_std: float = Field(
        0.05, gt=0, le=10, description="standard deviation of the Gaussian initial weights"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability that a hidden value is dropped in training"
    )

    @property
    def module_paths(self) -> list[str]:
        """Paths of the network's modules, in forward order."""
        kinds = ["linear", "norm", "activation", *(["dropout"] if self.dropout else [])]
        levels = range(1, len(self.hidden) + 1)
        return ["flatten", *(f"{kind}{level}" for level in levels for kind in kinds), "output"]


class CnnSpec(FrozenModel):
    """Small convolutional network.

    Each level has a 3x3 convolution, a norm, an activation and 2x2 pooling; a mean over the image and a
    linear layer follow.
    """

    name: Literal["cnn"] = "cnn"
    channels: Annotated[list[Width], Field(min_length=1, max_length=16)] = Field(
        [32, 64, 128], description="channels of each level; all but the last one halve the image"
    )
    activation: Activation = Field("relu", description="nonlinearity after each norm")
    init_std: float | None = Field(
        None,
        gt=0,
        le=10,
        description="standard deviation of the initial weights; null: √(2/fan in), He et al. 2015",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability that an input of the last layer is dropped"
    )
    local_response_norm: bool = Field(
        False, description="local response normalisation after each activation but the last (size 5)"
    )

    @property
    def module_paths(self) -> list[str]:
        """Paths of the network's modules, in forward order."""
        kinds, last = ["conv", "norm", "activation"], len(self.channels)
        between = [*(["local_response_norm"] if self.local_response_norm else []), "pool"]
        paths = [f"{kind}{level}" for level in range(1, last) for kind in (*kinds, *between)]
        dropout = ["dropout"] if self.dropout else []
        return [*paths, *(f"{kind}{last}" for kind in kinds), "mean", "flatten", *dropout, "output"]


class LibraryModelSpec(FrozenModel):
    """Untrained model of torchvision or timm, for the dataset's channels and classes."""

    name: Annotated[str, Field(pattern=r"^(torchvision|timm):[A-Za-z0-9][A-Za-z0-9_.]*$", max_length=120)] = (
        Field(description="`torchvision:resnet18`, `timm:resnet26` …")
    )
    arguments: Arguments = Field({}, description="keyword arguments of the library's builder")
    activation: Activation | None = Field(None, description="nonlinearity in place of the model's own ReLU")
    init_scale: float = Field(
        1.0, gt=0, le=1e3, description="factor on every initial weight matrix and kernel"
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="probability of every dropout layer; null: the model's"
    )
    local_response_norm_after: list[str] = Field(
        [],
        max_length=64,
        description="paths of modules that are followed by local response normalisation (size 5)",
    )

    @field_validator("arguments")
    @classmethod
    def _load_nothing(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        refused = sorted(arguments.keys() & (LOADING_ARGUMENTS | OWN_ARGUMENTS))
        if refused:
            raise ValueError(
                f"must not contain {', '.join(refused)}: models start untrained, for the dataset and the norm"
            )
        return arguments


class ImportedModelSpec(FrozenModel):
    """Model built by a function of an installed module.

    The operator allows functions by SYNCBN_ALLOWED_IMPORTS.
    """

    name: Annotated[
        str, Field(pattern=r"^import:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$", max_length=300)
    ] = Field(
        description="`import:package.module:function`; called with `arguments`, it returns a torch.nn.Module"
    )
    arguments: Arguments = Field({}, description="keyword arguments of the function")

    @property
    def module(self) -> str:
        """Module to import."""
        return self.name.split(":")[1]

    @property
    def function(self) -> str:
        """Name of the function that builds the model."""
        return self.name.split(":")[2]


def _model_kind(value: Any) -> str | None:
    """Return the kind of a model; `mlp` by default."""
    return kind_of(value, default="mlp")


ModelSpec = Annotated[
    Annotated[MlpSpec, Tag("mlp")]
    | Annotated[CnnSpec, Tag("cnn")]
    | Annotated[LibraryModelSpec, Tag("torchvision")]
    | Annotated[LibraryModelSpec, Tag("timm")]
    | Annotated[ImportedModelSpec, Tag("import")],
    Discriminator(
        _model_kind,
        custom_error_type="model_name",
        custom_error_message="name must be mlp, cnn, torchvision:<name>, timm:<name> "
        "or import:<module>:<function>",
    ),
]

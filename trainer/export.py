"""Export of the trained model: state_dict, MLflow model, ONNX."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from syncbn import revert_sync_batchnorm
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.state import TrainProgress
from trainer.checkpoint.state_dict import gather_model_state
from trainer.data import Dataset
from trainer.distributed import RankInfo
from trainer.errors import StorageError
from trainer.jobspec import ImportedModelSpec, JobSpec
from trainer.models import build_model


@dataclass(frozen=True)
class ExportedModel:
    """Weights of one step of a run, as they were evaluated."""

    name: str
    """`model` for the one that the specification selects; `model-best` or `model-last` for the other one."""
    which: Literal["best", "last"]
    step: int
    weights: dict[str, Any]


def collect_models(
    spec: JobSpec, model: nn.Module, position: TrainProgress, checkpoints: Checkpoints, worker: RankInfo
) -> list[ExportedModel]:
    """Return the weights to export on rank 0, the selected ones first.

    Returns an empty list on other ranks. Collective if the model is sharded. Statistics of batch
    normalisation are those that the evaluation of the same step used.
    """
    weights = gather_model_state(model, keep=worker.rank == 0)
    if worker.rank > 0:
        return []
    last = ExportedModel("model", "last", position.step, weights | position.statistics)
    try:
        found = checkpoints.load_best()
    except StorageError as error:  # a finished run must not fail
        print(f"warning: exporting the last model instead of the best: {error}", flush=True)
        return [last]
    if found is None:
        return [last]
    manifest, shared = found
    if manifest.step == position.step:
        return [replace(last, which="best")]
    best = ExportedModel("model", "best", manifest.step, shared["model"] | shared["position"]["statistics"])
    if spec.checkpoint.export == "best":
        return [best, replace(last, name="model-last")]
    return [last, replace(best, name="model-best")]


def write_weights(weights: dict[str, Any], path: Path) -> None:
    """Write a state_dict, replacing an existing file."""
    part = path.with_name(f".{path.name}.part")
    torch.save(weights, part)
    part.replace(path)


def export_model(
    spec: JobSpec, weights: dict[str, Any], dataset: Dataset, example: Tensor, folder: Path
) -> bool:
    """Write a folder for `mlflow.pytorch.load_model`; return whether it succeeded.

    The folder has signature and input example. Synchronised layers become plain nn.BatchNorm, so that library
    models and built-in networks load without this project's code. A model that cannot be rebuilt with the
    same weights, cannot be pickled or has subclasses of synchronised layers is not written, and the log has
    the reason; its weights are kept.

    Args:
        spec: specification of the run.
        weights: full state_dict of the model.
        dataset: training dataset; the metadata has its class names and image transform.
        example: inputs (n, *shape), n ≥ 1, on any device.
        folder: folder to create, replacing an existing one.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    inputs = example.cpu()
    try:
        model = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, spec.seed).to(
            example.dtype
        )
        model.load_state_dict(weights)
        model = revert_sync_batchnorm(model).eval()
        with torch.no_grad():
            outputs = model(inputs)
        mlflow.pytorch.save_model(
            model,
            str(folder),
            signature=infer_signature(inputs.numpy(), outputs.numpy()),
            input_example=inputs.numpy(),
            metadata=_metadata(spec, dataset),
            serialization_format="pickle",  # the module, which can be trained, not a traced graph
            # Given explicitly, since MLflow would load the model in another process to infer them.
            pip_requirements=_requirements(spec),
        )
    except Exception as error:  # user code may raise anything; a finished run must not fail
        print(f"warning: the model is not logged to MLflow: {type(error).__name__}: {error}", flush=True)
        return False
    return True


def write_onnx(folder: Path, path: Path) -> None:
    """Write an exported model, with its metadata, as ONNX.

    The graph maps `inputs` (N, *shape) to `logits` (N, classes) for any N.

    Args:
        folder: folder that `export_model` has written.
        path: path of the new file.

    Raises:
        ImportError: the extra `onnx` is not installed.
        OSError: the folder cannot be read, or the file cannot be written.
        torch.onnx.OnnxExporterError: ONNX does not support an operation of the model.
    """
    import mlflow.pytorch
    from mlflow.models import Model

    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError("ONNX export needs the packages of `pip install 'syncbn[onnx]'`") from None
    described = Model.load(str(folder))
    model = mlflow.pytorch.load_model(str(folder)).eval()
    first = next(model.parameters())
    example = torch.as_tensor(described.load_input_example(str(folder)), dtype=first.dtype)[:1]
    example = torch.cat([example, example])  # the exporter would treat a batch of one as a fixed size
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["inputs"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    assert program is not None
    for name, value in (described.metadata or {}).items():
        program.model.metadata_props[name] = json.dumps(value)
    program.save(path)


def _metadata(spec: JobSpec, dataset: Dataset) -> dict[str, Any]:
    """Return the metadata to prepare an image and to interpret the outputs."""
    metadata: dict[str, Any] = {"class_names": list(dataset.class_names)}
    if (transform := getattr(spec.data, "transform", None)) is not None:
        # Test transform: resize, crop, scaling of uint8 to [0, 1], normalisation.
        metadata["transform"] = transform.model_dump(include={"resize", "crop", "channels", "mean", "std"})
    return metadata


def _requirements(spec: JobSpec) -> list[str]:
    from importlib.metadata import version

    packages = ["torch", "mlflow"]
    library = spec.model.name.partition(":")[0]
    if library in ("torchvision", "timm"):
        packages.append(library)
    if isinstance(spec.model, ImportedModelSpec):
        packages.append("syncbn")
    return [f"{package}=={version(package)}" for package in packages]


def main() -> None:
    """Write an exported model as ONNX."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export", description="Write an exported model as ONNX."
    )
    parser.add_argument(
        "folder", type=Path, help="`model` folder of a run, from MLflow or from an attempt's folder"
    )
    parser.add_argument("file", type=Path, help="file to write, such as model.onnx")
    arguments = parser.parse_args()
    try:
        write_onnx(arguments.folder, arguments.file)
    except (ImportError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

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
    """`model` for the one that the spec asks for; `model-best` or `model-last` for the other."""
    which: Literal["best", "last"]
    step: int
    weights: dict[str, Any]


def collect_models(
    spec: JobSpec, model: nn.Module, position: TrainProgress, checkpoints: Checkpoints, worker: RankInfo
) -> list[ExportedModel]:
    """Collect the weights to export on rank 0, the chosen ones first; none on others. Collective if the model is sharded.

    Statistics of batch normalisation are those that the evaluation of the same step used.
    """
    weights = gather_model_state(model, keep=worker.rank == 0)
    if worker.rank > 0:
        return []
    last = ExportedModel("model", "last", position.step, weights | position.statistics)
    try:
        found = checkpoints.load_best()
    except StorageError as error:  # a run that is done must not fail by it
        print(f"the last model is exported, not the best: {error}", flush=True)
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
    """Write a state_dict, in place of the file that was there."""
    part = path.with_name(f".{path.name}.part")
    torch.save(weights, part)
    part.replace(path)


def export_model(spec: JobSpec, weights: dict[str, Any], dataset: Dataset, example: Tensor, folder: Path) -> bool:
    """Write a folder that `mlflow.pytorch.load_model` reads, with signature and input example; return whether that could be done.

    Synchronised layers become plain nn.BatchNorm, so that a library's model, or one of ours, loads without this project's code.
    A model that cannot be built again with the same weights, cannot be pickled or has subclasses of synchronised layers is left
    out, and the log says why; its weights are kept.

    Args:
        spec: of the run.
        weights: the model's whole state_dict.
        dataset: that it was trained on; names of its classes and the preparation of its images go into the metadata.
        example: inputs (n, *shape), n ≥ 1, on any device.
        folder: is created, replacing an existing one.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    inputs = example.cpu()
    try:
        model = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, spec.seed).to(example.dtype)
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
            serialization_format="pickle",  # the module itself, that can be trained on; not a traced graph of it
            # Named rather than found out, which MLflow does by loading the model in another process.
            pip_requirements=_requirements(spec),
        )
    except Exception as error:  # of the user's code, or of its layers; a run that is done must not fail by it
        print(f"the model is not logged to MLflow: {type(error).__name__}: {error}", flush=True)
        return False
    return True


def write_onnx(folder: Path, path: Path) -> None:
    """Write an exported model as ONNX: `inputs` (N, *shape) to `logits` (N, classes), for any N, with its metadata.

    Args:
        folder: that `export_model` has written.
        path: of the file to write.

    Raises:
        ImportError: the extra `onnx` is not installed.
        OSError: the folder cannot be read, or the file cannot be written.
        torch.onnx.OnnxExporterError: the model has an operation that ONNX does not have.
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
    example = torch.cat([example, example])  # a batch of one would be taken for a fixed size
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
    """Return what a caller needs to prepare an image and to read the outputs."""
    metadata: dict[str, Any] = {"class_names": list(dataset.class_names)}
    if (transform := getattr(spec.data, "transform", None)) is not None:
        # Those of testing: images are resized, cropped, scaled to 0 to 1 if they are uint8, and normalised.
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
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description="Write an exported model as ONNX.")
    parser.add_argument("folder", type=Path, help="the run's `model` folder, downloaded from MLflow or of an attempt")
    parser.add_argument("file", type=Path, help="to write, such as model.onnx")
    arguments = parser.parse_args()
    try:
        write_onnx(arguments.folder, arguments.file)
    except (ImportError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

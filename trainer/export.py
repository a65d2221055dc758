"""The trained model, as files that others can read: a state_dict, and a model that MLflow loads."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn import revert_sync_batchnorm
from trainer.models import build_model
from trainer.spec import ImportedModelSpec, JobSpec
from trainer.state_dict import gather_model_state
from trainer.worker import Worker


def export_weights(model: nn.Module, path: Path, worker: Worker) -> dict[str, Any]:
    """Write the whole model's state_dict by rank 0, and return it; where it is sharded, all workers bring their parts."""
    weights = gather_model_state(model, keep=worker.rank == 0)
    if worker.rank == 0:
        part = path.with_name(f".{path.name}.part")
        torch.save(weights, part)
        part.replace(path)
    return weights


def export_model(
    spec: JobSpec, weights: dict[str, Any], shape: tuple[int, ...], classes: int, example: Tensor, folder: Path
) -> bool:
    """Write a folder that `mlflow.pytorch.load_model` reads, with signature and input example; return whether that could be done.

    Synchronised layers become plain nn.BatchNorm, so that a library's model, or one of ours, loads without this project's code.
    A model that cannot be pickled is told of and left out: its weights are there all the same.

    Args:
        spec: of the run.
        weights: the model's whole state_dict.
        shape: of a sample, channels first.
        classes: number of classes.
        example: inputs (n, *shape), n ≥ 1, on any device.
        folder: is made anew.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    model = build_model(spec.model, spec.norm, shape, classes, spec.seed).to(example.dtype)
    model.load_state_dict(weights)
    model = revert_sync_batchnorm(model).eval()
    inputs = example.cpu()
    with torch.no_grad():
        outputs = model(inputs)
    try:
        mlflow.pytorch.save_model(
            model,
            str(folder),
            signature=infer_signature(inputs.numpy(), outputs.numpy()),
            input_example=inputs.numpy(),
            serialization_format="pickle",  # the module itself, that can be trained on; not a traced graph of it
            # Named rather than found out, which MLflow does by loading the model in another process.
            pip_requirements=_requirements(spec),
        )
    except Exception as error:  # pickling runs the user's code; a run that is done must not fail by it
        print(f"the model is not logged to MLflow: {type(error).__name__}: {error}", flush=True)
        return False
    return True


def _requirements(spec: JobSpec) -> list[str]:
    from importlib.metadata import version

    packages = ["torch", "mlflow"]
    library = spec.model.name.partition(":")[0]
    if library in ("torchvision", "timm"):
        packages.append(library)
    if isinstance(spec.model, ImportedModelSpec):
        packages.append("syncbn")
    return [f"{package}=={version(package)}" for package in packages]

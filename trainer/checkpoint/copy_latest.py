"""Copies of the newest and the best checkpoint of the job that is resumed."""

import json
import re

import fsspec

from trainer.driver.history import checkpoint_folder
from trainer.jobspec import CheckpointSpec, Task, best_value

NAME = re.compile(r"^step-(\d{12})-[0-9a-f]{8}$")
"""Of a checkpoint's folder."""
MANIFEST = "manifest.json"
"""Written last: what has none was never finished."""


def copy_latest_checkpoint(task: Task) -> str | None:
    """Copy the newest finished checkpoint of the newest of `resumed_from` that has one, and the best one; return the newest's name.

    Nothing is done if the job has it, or a newer one, already. Whether the copy is whole and fits the spec is up to `Checkpoints`.
    Raises OSError if the storage does not answer.
    """
    if not task.context.resumed_from:
        return None
    files, own = fsspec.core.url_to_fs(checkpoint_folder(task))
    owned = _finished(files, own)
    for job_id in task.context.resumed_from:
        _, theirs = fsspec.core.url_to_fs(checkpoint_folder(task, job_id))
        names = _finished(files, theirs)
        if not names:
            continue
        if owned and owned[-1] >= names[-1]:
            return None
        # The newest one last: it shows that the others are there.
        for name in dict.fromkeys([*_best(files, theirs, names, task.spec.checkpoint), names[-1]]):
            _copy(files, f"{theirs}/{name}", f"{own}/{name}")
            print(f"copies {name} of {job_id}", flush=True)
        return names[-1]
    if not owned:
        print(f"none of {', '.join(task.context.resumed_from)} has a checkpoint; starting from step 0", flush=True)
    return None


def _best(files: fsspec.AbstractFileSystem, folder: str, names: list[str], spec: CheckpointSpec) -> list[str]:
    """Return the name of the best checkpoint by `spec.keep_best`, if there is one, before the newest one's."""
    if spec.keep_best is None:
        return []
    values = {}
    for name in names:
        metrics = json.loads(files.cat_file(f"{folder}/{name}/{MANIFEST}")).get("metrics", {})
        if spec.keep_best in metrics:
            values[name] = metrics[spec.keep_best]
    best = best_value(values.values(), spec.best_direction) if values else None
    return [name for name, value in values.items() if value == best][-1:]


def _copy(files: fsspec.AbstractFileSystem, source: str, target: str) -> None:
    """Copy a checkpoint, its manifest last."""
    files.makedirs(target, exist_ok=True)
    for path in sorted(files.ls(source, detail=False), key=lambda path: path.endswith(f"/{MANIFEST}")):
        files.cp_file(path, f"{target}/{path.rpartition('/')[2]}")


def _finished(files: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    """Names of the checkpoints that have a manifest, oldest first."""
    if not files.exists(folder):
        return []
    files.invalidate_cache(folder)
    names = sorted(str(path).rstrip("/").rpartition("/")[2] for path in files.ls(folder, detail=False))
    return [name for name in names if NAME.match(name) and files.exists(f"{folder}/{name}/{MANIFEST}")]

"""Copies of checkpoints from the job that a job resumes."""

import json
import re

import fsspec

from trainer.driver.history import checkpoint_folder
from trainer.jobspec import AttemptTask, CheckpointSpec, best_value

NAME = re.compile(r"^step-(\d{12})-[0-9a-f]{8}$")
"""Name of a checkpoint folder."""
MANIFEST = "manifest.json"
"""File that completes a checkpoint: it is written last."""


def copy_latest_checkpoint(task: AttemptTask) -> str | None:
    """Copy the newest and the best checkpoint of the newest job in `resumed_from`.

    Jobs without a complete checkpoint are skipped. Returns the name of the newest checkpoint; None, without a
    copy, if the job already has this or a newer one. `Checkpoints` verifies the copies. Raises OSError if the
    storage does not answer.
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
        # The newest one last: its existence implies that of the others.
        for name in dict.fromkeys([*_best(files, theirs, names, task.spec.checkpoint), names[-1]]):
            _copy(files, f"{theirs}/{name}", f"{own}/{name}")
            print(f"copied checkpoint {name} of {job_id}", flush=True)
        return names[-1]
    if not owned:
        print(
            f"no checkpoint in {', '.join(task.context.resumed_from)}; starting from step 0",
            flush=True,
        )
    return None


def _best(files: fsspec.AbstractFileSystem, folder: str, names: list[str], spec: CheckpointSpec) -> list[str]:
    """Return the name of the best checkpoint by `spec.keep_best`, or nothing."""
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
    """Return the names of the checkpoints that have a manifest, oldest first."""
    if not files.exists(folder):
        return []
    files.invalidate_cache(folder)
    names = sorted(str(path).rstrip("/").rpartition("/")[2] for path in files.ls(folder, detail=False))
    return [name for name in names if NAME.match(name) and files.exists(f"{folder}/{name}/{MANIFEST}")]

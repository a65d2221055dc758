"""What a job that resumes another one takes over from it: its newest checkpoint, as a copy of its own."""

import re

import fsspec

from trainer.manifest import checkpoint_folder
from trainer.spec import Task

NAME = re.compile(r"^step-(\d{12})-[0-9a-f]{8}$")
"""Of a checkpoint's folder."""
MANIFEST = "manifest.json"
"""Written last: what has none was never finished."""


def adopt(task: Task) -> str | None:
    """Copy the newest finished checkpoint of the newest of `resumed_from` that has one; return its name.

    Nothing is done if the job has a finished one already. Whether the copy is whole, and fits the spec, `Checkpoints` finds out.
    Raises OSError if the storage does not answer.
    """
    files, mine = fsspec.core.url_to_fs(checkpoint_folder(task))
    if not task.context.resumed_from or _finished(files, mine):
        return None
    for job_id in task.context.resumed_from:
        _, theirs = fsspec.core.url_to_fs(checkpoint_folder(task, job_id))
        if names := _finished(files, theirs):
            name = names[-1]
            paths = sorted(files.ls(f"{theirs}/{name}", detail=False), key=lambda path: path.endswith(f"/{MANIFEST}"))
            files.makedirs(f"{mine}/{name}", exist_ok=True)
            for path in paths:
                files.cp_file(path, f"{mine}/{name}/{path.rpartition('/')[2]}")
            print(f"takes over {name} of {job_id}", flush=True)
            return name
    print(f"none of {', '.join(task.context.resumed_from)} has a checkpoint; begins anew", flush=True)
    return None


def _finished(files: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    """Names of the checkpoints that have a manifest, oldest first."""
    if not files.exists(folder):
        return []
    files.invalidate_cache(folder)
    names = sorted(str(path).rstrip("/").rpartition("/")[2] for path in files.ls(folder, detail=False))
    return [name for name in names if NAME.match(name) and files.exists(f"{folder}/{name}/{MANIFEST}")]

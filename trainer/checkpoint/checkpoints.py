"""Checkpoints: the state of a run in one folder, on any fsspec storage.

A checkpoint is a folder `step-<steps>-<token>` with `shared.pt`, one `rank-<number>.pt` for each worker, and `manifest.json`, which
names all files with their sizes and hashes, and is written last. A folder without a manifest is one that was never finished.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem

from trainer.atomic import HashingWriter, to_disk
from trainer.checkpoint.background import BackgroundTask
from trainer.checkpoint.copy_latest import MANIFEST, NAME
from trainer.checkpoint.state import TrainState
from trainer.distributed import RankInfo
from trainer.errors import StorageError
from trainer.jobspec import CheckpointSpec

FORMAT = 3
"""Changes when older checkpoints cannot be read any more."""
SHARED = "shared.pt"
CHUNK_BYTES = 1 << 22
WRITE_SECONDS = 1800.0
"""Limit for writing one checkpoint."""
CLOSE_SECONDS = 10.0
"""Limit for a checkpoint that is still being written when its run fails."""


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says which, and why."""


class CorruptCheckpointError(CheckpointError):
    """It was never finished, or has been damaged since."""


class CheckpointMismatchError(CheckpointError):
    """It is whole, but another run's."""


@dataclass(frozen=True)
class Manifest:
    """A checkpoint that is whole."""

    name: str
    step: int
    world_size: int
    identity: dict[str, str]
    """What must be equal for the state to be taken over: the parts of the spec and the data that shape it."""
    metrics: dict[str, float]
    files: dict[str, tuple[int, str]]
    """File name to bytes and SHA-256."""


class Checkpoints:
    """The checkpoints of one job; every worker has one, and all workers call the same methods."""

    def __init__(
        self,
        folder: str,
        spec: CheckpointSpec,
        identity: dict[str, str],
        worker: RankInfo,
        marker: Path | None = None,
    ) -> None:
        """`marker` is a file that is there as long as a checkpoint is being written."""
        self._files, self._root = fsspec.core.url_to_fs(folder)
        self._spec, self._identity, self._worker, self._marker = spec, identity, worker, marker
        self._writing = BackgroundTask()
        self._group: Any = None
        if worker.world_size > 1:
            # A missing worker is found within the time limit of the default group, not within that of the new one.
            dist.barrier()
            # A thread's collectives must not come between those of training, and storage may be slower than those may be.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=WRITE_SECONDS))
        self._torn: set[str] = set()
        self.refused: list[str] = []
        """Why newer checkpoints than the one loaded were not taken; on rank 0."""

    def save(self, state: TrainState) -> None:
        """Copy the state to host memory, and write it in the background; every worker calls it at the same step.

        Waits for the checkpoint before, if that is still being written, and raises what `wait` does. A checkpoint exists once all
        workers' files are there: a kill at any moment leaves the one before it.
        """
        self.wait()
        step = state.position.step
        name: str = self._from_rank_zero(f"step-{step:012d}-{secrets.token_hex(4)}")
        contents = {rank_file(self._worker.rank): state.own()}
        if (shared := state.shared()) is not None:
            contents[SHARED] = shared
        # A step that was not evaluated has no value to be the best by.
        metrics = dict(state.position.metrics) if state.position.evaluated == step else {}
        self._mark(name)
        self._writing.start(partial(self._write_checkpoint, name, step, metrics, contents))

    @property
    def has_failed(self) -> bool:
        """Whether the newest checkpoint could not be written, as far as this worker knows now."""
        return self._writing.has_failed

    def wait(self) -> None:
        """Wait until the newest checkpoint exists. Raises StorageError, on every worker, if any of them could not write."""
        try:
            self._writing.wait(WRITE_SECONDS)
        except TimeoutError:
            raise StorageError(f"a checkpoint in {self._root} was not written within {WRITE_SECONDS:.0f} s") from None
        finally:
            self._mark(None)

    def close(self) -> None:
        """Wait a few seconds for a checkpoint that is being written; its error is only logged."""
        try:
            self._writing.wait(CLOSE_SECONDS)
        except Exception as error:  # the run has already ended with another error
            print(f"the last checkpoint in {self._root} is missing: {_describe(error)}", flush=True)
        finally:
            self._mark(None)

    def _mark(self, name: str | None) -> None:
        """Show the driver, which may be asked to stop, that a checkpoint is being written."""
        if self._marker is None or self._worker.rank > 0:
            return
        if name is None:
            self._marker.unlink(missing_ok=True)
        else:
            self._marker.write_text(name)

    def _write_checkpoint(
        self, name: str, step: int, metrics: dict[str, float], contents: dict[str, dict[str, Any]]
    ) -> None:
        """Write this worker's files, and on rank 0 the manifest once all workers have written theirs."""
        rank = self._worker.rank
        mine: Any = {}
        try:
            self._files.makedirs(f"{self._root}/{name}", exist_ok=True)
            for file, content in contents.items():
                mine[file] = self._write(name, file, content)
        except Exception as error:  # a storage's errors are of any kind, and the others wait for word of them
            mine = f"worker {rank}: {_describe(error)}"
        written = self._from_all(mine)
        failure = "; ".join(entry for entry in written if isinstance(entry, str))
        if rank == 0 and not failure:
            try:
                files = {file: place for entry in written for file, place in entry.items()}
                self._write_manifest(Manifest(name, step, self._worker.world_size, self._identity, metrics, files))
            except Exception as error:
                failure = f"worker 0: {_describe(error)}"
        if rank == 0 and not failure:
            self._mark(None)
            try:
                self._prune(
                    name
                )  # before the others are answered, so that they do not wait for it in other collectives
            except Exception as error:
                print(f"old checkpoints in {self._root} could not be removed: {_describe(error)}", flush=True)
        failure = self._from_rank_zero(failure)
        if failure:
            raise StorageError(f"the checkpoint of step {step} in {self._root} could not be written: {failure}")

    def load(self, state: TrainState) -> Manifest | None:
        """Take over the newest checkpoint that is whole and of this job; None, and nothing changed, if there is none.

        What is torn, or was written for another spec, is named in `refused`, and the one before it is taken. Raises StorageError,
        on every worker, if the storage cannot be read.
        """
        chosen: Manifest | str | None = None
        if self._worker.rank == 0:
            try:
                chosen = next(self.manifests(), None)
            except Exception as error:
                chosen = f"the checkpoints in {self._root} could not be read: {_describe(error)}"
        manifest = self._from_rank_zero(chosen)
        if isinstance(manifest, str):
            raise StorageError(manifest)
        if manifest is None:
            return None
        is_same_size = manifest.world_size == self._worker.world_size
        failure = ""
        try:
            own = self._read(manifest, rank_file(self._worker.rank)) if is_same_size else None
            shared = self._read(manifest, SHARED)
        except Exception as error:  # of any kind, and the others wait for word of it
            failure = f"worker {self._worker.rank}: {_describe(error)}"
        if failure := "; ".join(filter(None, self._from_all(failure))):
            raise StorageError(f"{manifest.name} in {self._root} could not be read: {failure}")
        state.restore(shared, own)
        return cast("Manifest", manifest)

    def load_best(self) -> tuple[Manifest, dict[str, Any]] | None:
        """Read the shared state of the best whole checkpoint by `keep_best`; None if there is none. Collectives: none.

        Raises StorageError if the storage cannot be read.
        """
        try:
            best = best_of(list(self.manifests()), self._spec)
            return None if best is None else (best, self._read(best, SHARED))
        except Exception as error:
            raise StorageError(f"the best checkpoint in {self._root} could not be read: {_describe(error)}") from error

    def manifests(self) -> Iterator[Manifest]:
        """Yield whole checkpoints of this job, newest first; notes in `refused` why others are not taken."""
        for name in sorted(self._names(), reverse=True):
            try:
                yield self._verify(name)
            except CheckpointError as error:
                self.refused.append(str(error))
                self._torn |= {name} if isinstance(error, CorruptCheckpointError) else set()

    def _names(self) -> list[str]:
        if not self._files.exists(self._root):
            return []
        self._files.invalidate_cache(self._root)
        names = [str(path).rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
        return [name for name in names if NAME.match(name)]

    def _verify(self, name: str) -> Manifest:
        """Read a manifest and compare every file with it."""
        manifest = self._read_manifest(name)
        for file, expected in manifest.files.items():
            self._compare(name, file, expected)
        return manifest

    def _read_manifest(self, name: str) -> Manifest:
        try:
            content = json.loads(self._files.cat_file(f"{self._root}/{name}/{MANIFEST}"))
            if content["format"] != FORMAT:
                raise CheckpointMismatchError(f"{name}: format must be {FORMAT} (got {content['format']})")
            manifest = Manifest(
                name=name,
                step=content["step"],
                world_size=content["world_size"],
                identity=content["identity"],
                metrics=content["metrics"],
                files={file: (size, digest) for file, (size, digest) in content["files"].items()},
            )
            theirs = manifest.identity
            differing = sorted(
                key for key in self._identity.keys() | theirs.keys() if self._identity.get(key) != theirs.get(key)
            )
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{name}: torn: it has no {MANIFEST}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CorruptCheckpointError(f"{name}: torn: {MANIFEST} is not one of ours") from None
        if differing:
            raise CheckpointMismatchError(f"{name}: foreign: it was written for another {', '.join(differing)}")
        return manifest

    def _compare(self, name: str, file: str, expected: tuple[int, str]) -> None:
        digest, size = hashlib.sha256(), 0
        try:
            with self._files.open(f"{self._root}/{name}/{file}", "rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{name}: torn: {file} is missing") from None
        if (size, digest.hexdigest()) != expected:
            raise CorruptCheckpointError(f"{name}: torn: {file} has {size} bytes of {expected[0]}, or other ones")

    def _write(self, name: str, file: str, content: dict[str, Any]) -> tuple[int, str]:
        with self._files.open(f"{self._root}/{name}/{file}", "wb") as stream:
            hashing = HashingWriter(stream)
            try:
                torch.save(content, cast("IO[bytes]", hashing))
            except RuntimeError as error:
                # torch reports the state of its writer instead of the error of the storage.
                raise hashing.error or error from error
            to_disk(stream)
        return hashing.size, hashing.digest.hexdigest()

    def _read(self, manifest: Manifest, file: str) -> dict[str, Any]:
        with self._files.open(f"{self._root}/{manifest.name}/{file}", "rb") as stream:
            content: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
        return content

    def _write_manifest(self, manifest: Manifest) -> None:
        content = {
            "format": FORMAT,
            "step": manifest.step,
            "world_size": manifest.world_size,
            "identity": manifest.identity,
            "metrics": manifest.metrics,
            "files": manifest.files,
        }
        path, text = f"{self._root}/{manifest.name}/{MANIFEST}", json.dumps(content, indent=1).encode()
        if not isinstance(self._files, LocalFileSystem):
            self._files.pipe_file(path, text)  # an object appears as a whole
            return
        with open(f"{path}.new", "wb") as stream:
            stream.write(text)
            to_disk(stream)
        Path(f"{path}.new").replace(path)
        for folder in (self._root, f"{self._root}/{manifest.name}"):
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    def _prune(self, newest: str) -> None:
        """Remove what the policy does not keep: all but the last ones and the best, and what was never finished before `newest`.

        What is whole and another run's is not ours to remove.
        """
        whole: list[Manifest] = []
        removed: list[str] = []
        for name in sorted(self._names(), reverse=True):
            try:
                if name in self._torn:
                    raise CorruptCheckpointError(name)
                whole.append(self._read_manifest(name))
            except CorruptCheckpointError:
                removed += [name] if name < newest else []
            except CheckpointMismatchError:
                continue
        kept = {manifest.name for manifest in whole[: self._spec.keep_last]} | {newest}
        if (best := best_of(whole, self._spec)) is not None:
            kept.add(best.name)
        removed += [manifest.name for manifest in whole if manifest.name not in kept]
        for name in removed:
            path = f"{self._root}/{name}"
            if self._files.exists(f"{path}/{MANIFEST}"):
                self._files.rm_file(f"{path}/{MANIFEST}")  # first, so that no half of it is ever taken for whole
            self._files.rm(path, recursive=True)

    def _from_rank_zero(self, value: Any) -> Any:
        """Return rank 0's value on every worker. Raises StorageError if a worker is missing."""
        return self._from_all(value if self._worker.rank == 0 else None)[0]

    def _from_all(self, value: Any) -> list[Any]:
        """Return every worker's value on every worker. Raises StorageError if a worker is missing."""
        if self._worker.world_size == 1:
            return [value]
        values: list[Any] = [None] * self._worker.world_size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            missing = f"a checkpoint in {self._root} needs an answer of every worker within {WRITE_SECONDS:.0f} s"
            raise StorageError(f"{missing}: {_describe(error)}") from error
        return values


def best_of(manifests: Sequence[Manifest], spec: CheckpointSpec) -> Manifest | None:
    """Return the best checkpoint by `spec.keep_best`, the newest of equal ones; None without one that has the metric."""
    metric, sign = spec.keep_best, 1 if spec.best_direction == "max" else -1
    scored = [manifest for manifest in manifests if metric in manifest.metrics]
    if metric is None or not scored:
        return None
    return max(scored, key=lambda manifest: (sign * manifest.metrics[metric], manifest.step))


def rank_file(rank: int) -> str:
    """Name of the file that holds what is a worker's own."""
    return f"rank-{rank:05d}.pt"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

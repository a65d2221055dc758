"""Checkpoints: one folder per saved state, on any fsspec storage.

A checkpoint is a folder `step-<steps>-<token>` with `shared.pt`, one `rank-<number>.pt` per worker, and
`manifest.json`, which lists all files with sizes and hashes and is written last. A folder without a manifest
is an incomplete checkpoint.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from trainer.atomic import HashingWriter, to_disk
from trainer.checkpoint.background import BackgroundTask
from trainer.checkpoint.copy_latest import MANIFEST, NAME
from trainer.checkpoint.state import TrainState
from trainer.distributed import RankInfo
from trainer.errors import StorageError
from trainer.jobspec import CheckpointSpec

FORMAT = 3
"""Version of the format; incremented when older checkpoints become unreadable."""
SHARED = "shared.pt"
CHUNK_BYTES = 1 << 22
WRITE_SECONDS = 1800.0
"""Timeout for writing one checkpoint."""
CLOSE_SECONDS = 10.0
"""Timeout for a checkpoint that is still being written when its run fails."""


class CheckpointError(Exception):
    """Checkpoint that cannot be used; the message has its name and the reason."""


class CorruptCheckpointError(CheckpointError):
    """Checkpoint that is incomplete or damaged."""


class CheckpointMismatchError(CheckpointError):
    """Complete checkpoint of another run."""


@dataclass(frozen=True)
class Manifest:
    """Manifest of a complete checkpoint."""

    name: str
    step: int
    world_size: int
    identity: dict[str, str]
    """Parts of the specification and the data that determine the state; must be equal on loading."""
    metrics: dict[str, float]
    files: dict[str, tuple[int, str]]
    """Size in bytes and SHA-256 of each file."""


class Checkpoints:
    """Checkpoints of one job; all workers call the same methods."""

    def __init__(
        self,
        folder: str,
        spec: CheckpointSpec,
        identity: dict[str, str],
        worker: RankInfo,
        marker: Path | None = None,
    ) -> None:
        """Open a folder; the file `marker` exists while a checkpoint is being written."""
        self._files, self._root = fsspec.core.url_to_fs(folder)
        self._spec, self._identity, self._worker, self._marker = spec, identity, worker, marker
        self._writing = BackgroundTask()
        # A separate group: the thread's collectives must not mix with those of training, and need a longer
        # timeout.
        self._group = worker.new_gloo_group(WRITE_SECONDS)
        self._corrupt: set[str] = set()
        self.refused: list[str] = []
        """Reasons for not loading newer checkpoints, on rank 0."""

    def save(self, state: TrainState) -> None:
        """Copy the state to host memory and write it in the background.

        Every worker calls this method at the same step. It waits for the previous checkpoint first, and
        raises what `wait` raises. A checkpoint exists once the files of all workers do: a kill at any time
        leaves the previous one intact.
        """
        self.wait()
        step = state.position.step
        name: str = self._from_rank_zero(f"step-{step:012d}-{secrets.token_hex(4)}")
        contents = {rank_file(self._worker.rank): state.own()}
        if (shared := state.shared()) is not None:
            contents[SHARED] = shared
        # Only an evaluated step can be the best one.
        metrics = dict(state.position.metrics) if state.position.last_eval_step == step else {}
        self._mark(name)
        self._writing.start(partial(self._write_checkpoint, name, step, metrics, contents))

    @property
    def has_failed(self) -> bool:
        """Whether the newest checkpoint has failed, as far as this worker knows."""
        return self._writing.has_failed

    def wait(self) -> None:
        """Wait until the newest checkpoint exists.

        Raises StorageError, on every worker, if any worker could not write its files.
        """
        try:
            self._writing.wait(WRITE_SECONDS)
        except TimeoutError:
            raise StorageError(
                f"a checkpoint in {self._root} was not written within {WRITE_SECONDS:.0f} s"
            ) from None
        finally:
            self._mark(None)

    def close(self) -> None:
        """Wait a few seconds for a checkpoint that is being written; only log its error."""
        try:
            self._writing.wait(CLOSE_SECONDS)
        except Exception as error:  # the run has already ended with another error
            print(f"warning: lost the last checkpoint in {self._root}: {_describe(error)}", flush=True)
        finally:
            self._mark(None)

    def _mark(self, name: str | None) -> None:
        """Signal to the driver that a checkpoint is being written."""
        if self._marker is None or self._worker.rank > 0:
            return
        if name is None:
            self._marker.unlink(missing_ok=True)
        else:
            self._marker.write_text(name)

    def _write_checkpoint(
        self, name: str, step: int, metrics: dict[str, float], contents: dict[str, dict[str, Any]]
    ) -> None:
        """Write this worker's files, and on rank 0 the manifest after those of all."""
        rank = self._worker.rank
        mine: Any = {}
        try:
            self._files.makedirs(f"{self._root}/{name}", exist_ok=True)
            for file, content in contents.items():
                mine[file] = self._write(name, file, content)
        except Exception as error:  # storages raise errors of any class, and the other workers wait below
            mine = f"worker {rank}: {_describe(error)}"
        written = self._from_all(mine)
        failure = "; ".join(entry for entry in written if isinstance(entry, str))
        if rank == 0 and not failure:
            try:
                files = {file: digest for entry in written for file, digest in entry.items()}
                self._write_manifest(
                    Manifest(name, step, self._worker.world_size, self._identity, metrics, files)
                )
            except Exception as error:
                failure = f"worker 0: {_describe(error)}"
        if rank == 0 and not failure:
            self._mark(None)
            try:
                # Before the broadcast below, so that the other workers do not wait in the next collective.
                self._prune(name)
            except Exception as error:
                print(
                    f"warning: could not remove old checkpoints in {self._root}: {_describe(error)}",
                    flush=True,
                )
        failure = self._from_rank_zero(failure)
        if failure:
            raise StorageError(
                f"the checkpoint of step {step} in {self._root} could not be written: {failure}"
            )

    def load(self, state: TrainState) -> Manifest | None:
        """Load the newest complete checkpoint of this job; return None if there is none.

        Corrupt checkpoints, and those of another specification, are listed in `refused` and skipped. Raises
        StorageError, on every worker, if the storage cannot be read.
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
        except Exception as error:  # of any class, and the other workers wait below
            failure = f"worker {self._worker.rank}: {_describe(error)}"
        if failure := "; ".join(filter(None, self._from_all(failure))):
            raise StorageError(f"{manifest.name} in {self._root} could not be read: {failure}")
        state.restore(shared, own)
        return cast("Manifest", manifest)

    def load_best(self) -> tuple[Manifest, dict[str, Any]] | None:
        """Read the shared state of the best complete checkpoint by `keep_best`.

        Returns None if there is none. Collectives: none. Raises StorageError if the storage cannot be read.
        """
        try:
            best = best_of(list(self.manifests()), self._spec)
            return None if best is None else (best, self._read(best, SHARED))
        except Exception as error:
            raise StorageError(
                f"the best checkpoint in {self._root} could not be read: {_describe(error)}"
            ) from error

    def manifests(self) -> Iterator[Manifest]:
        """Yield complete checkpoints of this job, newest first.

        Adds the reasons for skipping others to `refused`.
        """
        for name in sorted(self._names(), reverse=True):
            try:
                yield self._verify(name)
            except CheckpointError as error:
                self.refused.append(str(error))
                self._corrupt |= {name} if isinstance(error, CorruptCheckpointError) else set()

    def _names(self) -> list[str]:
        if not self._files.exists(self._root):
            return []
        self._files.invalidate_cache(self._root)
        names = [
            str(path).rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)
        ]
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
                key
                for key in self._identity.keys() | theirs.keys()
                if self._identity.get(key) != theirs.get(key)
            )
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{name}: incomplete: {MANIFEST} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CorruptCheckpointError(f"{name}: corrupt: {MANIFEST} cannot be parsed") from None
        if differing:
            raise CheckpointMismatchError(f"{name}: another run's: differs in {', '.join(differing)}")
        return manifest

    def _compare(self, name: str, file: str, expected: tuple[int, str]) -> None:
        digest, size = hashlib.sha256(), 0
        try:
            with self._files.open(f"{self._root}/{name}/{file}", "rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{name}: incomplete: {file} is missing") from None
        if (size, digest.hexdigest()) != expected:
            raise CorruptCheckpointError(
                f"{name}: corrupt: {file} must have {expected[0]} bytes with the SHA-256 of the manifest "
                f"(got {size} bytes)"
            )

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
            self._files.pipe_file(path, text)  # object stores write atomically
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
        """Remove checkpoints that are neither among the last ones nor the best one.

        Incomplete checkpoints older than `newest` are removed too; complete ones of other runs are kept.
        """
        whole: list[Manifest] = []
        removed: list[str] = []
        for name in sorted(self._names(), reverse=True):
            try:
                if name in self._corrupt:
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
                self._files.rm_file(f"{path}/{MANIFEST}")  # first: without it the checkpoint is incomplete
            self._files.rm(path, recursive=True)

    def _from_rank_zero(self, value: Any) -> Any:
        """Return rank 0's value on every worker.

        Raises StorageError if a worker is missing.
        """
        return self._from_all(value if self._worker.rank == 0 else None)[0]

    def _from_all(self, value: Any) -> list[Any]:
        """Return every worker's value on every worker.

        Raises StorageError if a worker is missing.
        """
        try:
            return self._worker.all_gather_object(value, self._group)
        except RuntimeError as error:
            missing = (
                f"a worker did not answer within {WRITE_SECONDS:.0f} s about a checkpoint in {self._root}"
            )
            raise StorageError(f"{missing}: {_describe(error)}") from error


def best_of(manifests: Sequence[Manifest], spec: CheckpointSpec) -> Manifest | None:
    """Return the best checkpoint by `spec.keep_best`, the newest among equals.

    Returns None if no checkpoint has the metric.
    """
    metric, sign = spec.keep_best, 1 if spec.best_direction == "max" else -1
    scored = [manifest for manifest in manifests if metric in manifest.metrics]
    if metric is None or not scored:
        return None
    return max(scored, key=lambda manifest: (sign * manifest.metrics[metric], manifest.step))


def rank_file(rank: int) -> str:
    """Return the name of a worker's own file."""
    return f"rank-{rank:05d}.pt"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

"""Allowlist of imports, folders and addresses that specs may use."""

import posixpath
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.jobspec.base import FrozenModel
from trainer.jobspec.data import ImageFolderSpec, RayDataSpec, TorchvisionDataSpec
from trainer.jobspec.models import ImportedModelSpec

if TYPE_CHECKING:
    from trainer.jobspec.job import JobSpec


class NotAllowed(ValueError):  # noqa: N818 - names say what is the case
    """A field of a spec reaches for something that the operator does not allow."""

    def __init__(self, field: str, value: str, takes: str) -> None:
        super().__init__(f"{field}: {takes} (got {value!r})")
        self.field, self.value, self.takes = field, value, takes


IMPORT_PATTERN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:([A-Za-z_]\w*|\*)"
"""Form of an allowed import."""


class Allowlist(FrozenModel):
    """Functions that build models, and roots of paths and fsspec addresses; nothing else is allowed."""

    everything: bool = False
    """For a spec that its user runs by hand."""
    imports: tuple[str, ...] = ()
    """`package.module:function`, or `package.module:*` for every function of a module that holds nothing but model builders.

    A module alone is not enough, and what lies below it is not allowed with it: a library has functions that do more than build a
    model, and a spec chooses the arguments.
    """
    roots: tuple[str, ...] = ()
    """Absolute folders and fsspec addresses such as `s3://bucket/folder`, with all below them; `/` allows every local path."""

    def check(self, spec: "JobSpec") -> None:
        """Raise NotAllowed, naming the field, if a spec reaches for anything else."""
        if self.everything:
            return
        if isinstance(spec.model, ImportedModelSpec):
            self._check_import("model.name", spec.model)
        match spec.data:
            case TorchvisionDataSpec(root=str(root)) | ImageFolderSpec(root=root):
                self.check_path("data.root", root)
            case RayDataSpec():
                self.check_path("data.train", spec.data.train)
                self.check_path("data.test", spec.data.test)
            case _:
                pass
        if spec.checkpoint.address is not None:
            self.check_path("checkpoint.address", spec.checkpoint.address)

    def _check_import(self, field: str, model: ImportedModelSpec) -> None:
        exact, whole = f"{model.module}:{model.function}", f"{model.module}:*"
        if not (exact in self.imports or (whole in self.imports and not model.function.startswith("_"))):
            allowed = ", ".join(self.imports) or "none; the operator allows them by SYNCBN_ALLOWED_IMPORTS"
            raise NotAllowed(field, model.name, f"must be an allowed function: {allowed}")

    def check_path(self, field: str, value: str) -> None:
        """Raise NotAllowed if a path or address does not lie below a root; links are followed."""
        if not any(_is_below(value, root) for root in self.roots):
            allowed = ", ".join(self.roots) or "none; the operator allows them by SYNCBN_ALLOWED_ROOTS"
            raise NotAllowed(field, value, f"must be an absolute path or address under {allowed}")


def _is_below(value: str, root: str) -> bool:
    # Chained addresses (`zip://x::s3://y`) name a second place behind the first, and an escaped path (`%2e%2e`) another one.
    if "::" in value or "%" in value:
        return False
    scheme, _, path = value.rpartition("://")
    root_scheme, _, root_path = root.rpartition("://")
    if scheme in ("", "file", "local") and root_scheme in ("", "file", "local"):
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(Path(root_path).resolve())
        except (OSError, ValueError, RuntimeError):  # a NUL character, or links that lead in a circle
            return False
    path, root_path = posixpath.normpath(path), posixpath.normpath(root_path)
    return scheme == root_scheme and (path == root_path or path.startswith(f"{root_path}/"))

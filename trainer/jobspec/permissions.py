"""Allowlist of imports, folders and addresses for specifications."""

import posixpath
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.jobspec.base import FileModel
from trainer.jobspec.data import ImageFolderSpec, RayDataSpec, TorchvisionDataSpec
from trainer.jobspec.errors import NotAllowed
from trainer.jobspec.models import ImportedModelSpec

if TYPE_CHECKING:
    from trainer.jobspec.job import JobSpec


IMPORT_PATTERN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:([A-Za-z_]\w*|\*)"
"""Form of an allowed import."""


class Allowlist(FileModel):
    """Allowed model builders, and allowed roots of paths and fsspec addresses.

    Everything else is forbidden.
    """

    everything: bool = False
    """Whether all checks are off, as for a specification that its author runs by hand."""
    imports: tuple[str, ...] = ()
    """Allowed functions: `package.module:function`, or `package.module:*` for all functions of a module that
    contains only model builders.

    A module name alone is not enough, and submodules are not included: libraries have functions that do more
    than build a model, and a specification chooses the arguments.
    """
    roots: tuple[str, ...] = ()
    """Allowed absolute folders and fsspec addresses such as `s3://bucket/folder`, including everything below
    them; `/` allows every local path.
    """

    def check(self, spec: "JobSpec") -> None:
        """Raise NotAllowed, with the field, if a specification uses anything else."""
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
        """Raise NotAllowed if a path or address is not below a root; links are followed."""
        if not any(_is_below(value, root) for root in self.roots):
            allowed = ", ".join(self.roots) or "none; the operator allows them by SYNCBN_ALLOWED_ROOTS"
            raise NotAllowed(field, value, f"must be an absolute path or address under {allowed}")


def _is_below(value: str, root: str) -> bool:
    # Chained addresses (`zip://x::s3://y`) contain a second address, and escaped paths (`%2e%2e`) may leave
    # the root.
    if "::" in value or "%" in value:
        return False
    scheme, _, path = value.rpartition("://")
    root_scheme, _, root_path = root.rpartition("://")
    if scheme in ("", "file", "local") and root_scheme in ("", "file", "local"):
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(Path(root_path).resolve())
        except (OSError, ValueError, RuntimeError):  # a NUL character, or a cycle of links
            return False
    path, root_path = posixpath.normpath(path), posixpath.normpath(root_path)
    return scheme == root_scheme and (path == root_path or path.startswith(f"{root_path}/"))

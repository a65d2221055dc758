"""Secrets of jobs: files in a folder of the operator.

Only their names are stored and sent.
"""

from pathlib import Path

from service.adapters.run_storage import on_storage
from service.domain.errors import UpstreamRejected
from trainer.jobspec import InvalidField

SHARED = "shared"
"""Folder of the secrets that all owners may use."""
MAX_NAMES_SHOWN = 20
"""Maximum number of names in an error message."""


class JobSecrets:
    """Secrets `<owner>/<name>` and `shared/<name>` in a folder that all nodes mount."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder.absolute() if folder else None

    async def resolve(self, owner: str, secrets: dict[str, str]) -> dict[str, str]:
        """Return references in full, as `<owner>/<name>`.

        Raises InvalidField for what the owner may not use, or is not there; UpstreamUnavailable if the folder
        does not answer.
        """
        if not secrets:
            return {}
        return await on_storage(
            lambda: {variable: self._resolve(owner, variable, name) for variable, name in secrets.items()}
        )

    def paths(self, secrets: dict[str, str]) -> dict[str, str]:
        """Return the paths of the values. Raises UpstreamRejected without the folder."""
        if secrets and self._folder is None:
            raise UpstreamRejected(
                f"the job needs secrets ({', '.join(secrets.values())}), and SYNCBN_SECRETS_FOLDER is not set"
            )
        return {variable: f"{self._folder}/{reference}" for variable, reference in secrets.items()}

    def _resolve(self, owner: str, variable: str, name: str) -> str:
        field = f"secrets.{variable}"
        if self._folder is None:
            raise InvalidField(
                field, name, "must be empty: the operator allows secrets by SYNCBN_SECRETS_FOLDER"
            )
        reference = name if "/" in name else f"{owner}/{name}"
        if reference.partition("/")[0] not in (owner, SHARED) or not self._is_there(reference):
            raise InvalidField(
                field, name, f"must be one of {', '.join(self._names(owner)) or 'none; there are none'}"
            )
        return reference

    def _is_there(self, reference: str) -> bool:
        """Return whether a file exists inside the owner's folder, also after links."""
        assert self._folder is not None
        path = self._folder / reference
        try:
            return path.is_file() and path.resolve().is_relative_to(path.parent.resolve())
        except OSError:
            return False

    def _names(self, owner: str) -> list[str]:
        assert self._folder is not None
        found = [
            f"{place}/{path.name}"
            for place in (owner, SHARED)
            for path in sorted((self._folder / place).glob("*"))
            if not path.name.startswith(".") and self._is_there(f"{place}/{path.name}")
        ]
        return found[:MAX_NAMES_SHOWN]

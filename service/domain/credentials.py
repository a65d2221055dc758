"""Credentials other than tokens: sign-in links, browser sessions, and what an attempt writes to MLflow with. Pure."""

from datetime import timedelta
from enum import StrEnum

SIGN_IN_LINK_LIFETIME = timedelta(minutes=10)
SESSION_LIFETIME = timedelta(hours=12)
HOME = "/mlflow/"
"""Page that a browser is sent to after sign-in, unless it asked for another one."""


class CredentialKind(StrEnum):
    """What a credential is for."""

    SIGN_IN = "sign_in"
    """One sign-in of a browser; used up by it."""
    SESSION = "session"
    """A signed-in browser."""
    ATTEMPT = "attempt"
    """Writes of one running attempt to its MLflow run."""


def local_path(target: str | None) -> str:
    """Return `target` if it is a path on this service, else the home page: a sign-in must not redirect to another site."""
    is_local = target is not None and target.startswith("/") and not target.startswith(("//", "/\\"))
    has_controls = target is not None and any(ord(letter) < 0x20 or letter == "\\" for letter in target)
    return target if target is not None and is_local and not has_controls else HOME

"""Settings of the API and dispatcher, read from environment variables."""

from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from trainer.spec import Permissions


class Settings(BaseSettings):
    """One field per `SYNCBN_*` variable, and Ray's own two; a test keeps the README's table the same."""

    model_config = SettingsConfigDict(env_prefix="SYNCBN_", frozen=True)

    token: SecretStr = Field(
        description="bearer token that every `/v1` call must carry, 16 characters or more", min_length=16
    )
    host: str = Field("127.0.0.1", description="address the API listens on")
    port: int = Field(8000, ge=1, le=65535, description="port the API listens on")
    database_url: str = Field(
        "sqlite+aiosqlite:///.syncbn/service.db",
        description="`sqlite+aiosqlite:///path` or `postgresql+asyncpg://user:password@host/name`",
    )
    storage: Path = Field(
        Path(".syncbn/storage"),
        description="folder for logs, outcomes and models; every node of the cluster mounts it at the same path",
    )
    ray_address: str = Field("http://127.0.0.1:8265", description="Ray's dashboard, which takes job submissions")
    mlflow_url: str = Field("http://127.0.0.1:5000", description="MLflow, as the service and the workers reach it")
    mlflow_public_url: str | None = Field(None, description="MLflow, as a browser reaches it, if that differs")
    poll_seconds: float = Field(0.5, gt=0, le=60, description="pause between two rounds of the dispatcher")
    call_timeout_seconds: float = Field(
        10, gt=0, le=300, description="time limit of one call to Ray, MLflow or the database"
    )
    max_active_jobs: int = Field(
        8, ge=1, description="jobs that may be with Ray at one time; each costs its head memory"
    )
    max_attempts: int = Field(3, ge=1, description="attempts of a job whose cluster was lost under it")
    allowed_imports: str | None = Field(
        None, description="modules, parted by commas, whose functions `import:` models may name, with all below them"
    )
    allowed_roots: str | None = Field(
        None,
        description="folders and fsspec addresses, parted by commas, that specs may read data from and write checkpoints to",
    )
    grace_seconds: float = Field(
        10,
        ge=0,
        le=3600,
        description="time for a run to show life, or write its outcome, after Ray alone says that it has ended",
    )
    ray_auth_token: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("RAY_AUTH_TOKEN", "ray_auth_token"),
        description="Ray's token, if it asks for one",
    )
    ray_auth_token_path: Path | None = Field(
        None,
        validation_alias=AliasChoices("RAY_AUTH_TOKEN_PATH", "ray_auth_token_path"),
        description="or a file that holds it",
    )

    def permissions(self) -> Permissions:
        """What the operator allows specs to reach."""
        return Permissions(imports=_parted(self.allowed_imports), roots=_parted(self.allowed_roots))

    def ray_token(self) -> str | None:
        """Ray's token, from wherever it was given. Raises OSError if the file cannot be read."""
        if self.ray_auth_token is not None:
            return self.ray_auth_token.get_secret_value()
        return self.ray_auth_token_path.read_text().strip() if self.ray_auth_token_path else None


def _parted(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())

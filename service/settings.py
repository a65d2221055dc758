"""Settings of the API and dispatcher, read from `SYNCBN_*` environment variables.

Ray's own authentication settings (`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN` or `RAY_AUTH_TOKEN_PATH`) are read by Ray itself.
"""

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """One field per `SYNCBN_*` variable; the README's table is made of these descriptions, and a test compares the two."""

    model_config = SettingsConfigDict(env_prefix="SYNCBN_", frozen=True)

    database_url: str = Field(
        "sqlite+aiosqlite:///.syncbn/service.db",
        description="SQLAlchemy address: `sqlite+aiosqlite:///path` or `postgresql+asyncpg://user:password@host/name`",
    )
    ray_address: str = Field("http://127.0.0.1:8265", description="Ray's dashboard, which takes job submissions")
    mlflow_url: str = Field("http://127.0.0.1:5000", description="MLflow server, as the service and the workers reach it")
    mlflow_public_url: str | None = Field(None, description="MLflow server, as a user's browser reaches it; default: `SYNCBN_MLFLOW_URL`")
    storage: Path = Field(
        Path(".syncbn/storage"), description="folder for logs, manifests and models; every node of the cluster mounts it at the same path"
    )
    token: SecretStr = Field(description="bearer token that every `/v1` call must carry", min_length=16)
    host: str = Field("127.0.0.1", description="address the API listens on")
    port: int = Field(8000, ge=1, le=65535, description="port the API listens on")
    poll_seconds: float = Field(0.5, gt=0, le=60, description="pause between two rounds of the dispatcher")
    max_active_jobs: int = Field(8, ge=1, description="jobs that may be with Ray at one time; each costs its head memory")
    max_attempts: int = Field(3, ge=1, description="tries of a job whose cluster was lost under it")
    call_timeout_seconds: float = Field(10, gt=0, le=300, description="time limit of one call to Ray, MLflow or the database")

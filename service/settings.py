"""Settings of the API and dispatcher, read from environment variables."""

import re
import socket
from datetime import timedelta
from pathlib import Path
from typing import Literal, Self

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.domain.access import Owner
from service.domain.scheduling import Policy, Quota
from service.domain.webhooks import IPNetwork, read_networks
from trainer.jobspec import IMPORT_PATTERN, Allowlist, FrozenModel


class OwnerQuota(FrozenModel):
    """What one owner's jobs may hold at one time."""

    jobs: int | None = Field(None, ge=0)
    cpus: float | None = Field(None, ge=0)
    gpus: float | None = Field(None, ge=0)


class Settings(BaseSettings):
    """One field per `SYNCBN_*` variable, and Ray's own two; a test compares them with docs/configuration.md."""

    model_config = SettingsConfigDict(env_prefix="SYNCBN_", frozen=True)

    token: SecretStr | None = Field(
        None,
        min_length=16,
        description="secret of a token with scope admin, 16 characters or more; without it the first start makes one and shows it",
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
    public_url: str | None = Field(
        None, description="this service, as browsers reach it; default: `http://<host>:<port>`"
    )
    cluster_url: str | None = Field(
        None, description="this service, as the cluster's nodes reach it, for metrics; default: the public one"
    )
    mlflow_url: str = Field(
        "http://127.0.0.1:5000", description="MLflow, as this service alone should be able to reach it"
    )
    mlflow_secret: SecretStr | None = Field(
        None,
        min_length=16,
        description="secret that `mlflow server --app-name syncbn` asks for; 16 characters or more",
    )
    trusted_proxies: str | None = Field(
        None,
        description="addresses and networks of reverse proxies, separated by commas, whose `X-Forwarded-For` is believed; "
        "default: none",
    )
    poll_seconds: float = Field(
        0.5, gt=0, le=60, description="pause between two rounds of the dispatcher; up to a second after long ones"
    )
    call_timeout_seconds: float = Field(
        10, gt=0, le=300, description="time limit of one call to Ray, MLflow or the database"
    )
    max_active_jobs: int = Field(
        8, ge=1, description="jobs that may be with Ray at one time; each costs its head memory"
    )
    replica: str | None = Field(
        None,
        max_length=80,
        description="name of this process among all that share the database, the same after a restart; default: host name and port",
    )
    lease_seconds: float = Field(
        6, ge=1, le=600, description="after how long without a sign of life others take over a replica's work"
    )
    backfill_seconds: float = Field(
        300, ge=0, description="how long smaller jobs may pass the first of the queue while it waits for room"
    )
    patience_seconds: float = Field(
        21_600, ge=0, description="after how long in the queue a job goes first, whatever the priority of others"
    )
    quota_jobs: int | None = Field(None, ge=0, description="jobs that an owner may have with Ray at one time")
    quota_cpus: float | None = Field(None, ge=0, description="CPUs that an owner's jobs may hold at one time")
    quota_gpus: float | None = Field(None, ge=0, description="GPUs that an owner's jobs may hold at one time")
    quota_stored_bytes: int | None = Field(
        1_000_000_000, ge=0, description="bytes that an owner's jobs may take in the database, ended ones included"
    )
    owner_quotas: dict[Owner, OwnerQuota] = Field(
        {},
        description='other quotas for some owners, as JSON: `{"ann": {"jobs": 4, "gpus": 8}}`; what is not given has no limit',
    )
    rate_per_second: float = Field(50, gt=0, description="requests that a token may make in a second, in the long run")
    rate_burst: int = Field(200, ge=1, description="requests that a token may make at once")
    check_seconds: float = Field(
        15,
        ge=0,
        le=60,
        description="how long a submission may wait until its library models, functions and datasets are checked by a process with "
        "torch; 0: they are not checked",
    )
    streams_per_token: int = Field(
        50, ge=1, description="logs and timelines that a token may follow at one time, on each replica"
    )
    max_artifact_bytes: int = Field(
        5_000_000_000, ge=1_000_000, description="bytes of one file that a run uploads to MLflow"
    )
    max_attempt_artifact_bytes: int = Field(
        20_000_000_000,
        ge=1_000_000,
        description="bytes that one attempt of a job may upload to MLflow in all; a file counts as a million or more",
    )
    webhook_networks: str | None = Field(
        None,
        description="networks, separated by commas, that webhooks may reach although they are not public, such as `10.1.0.0/16`",
    )
    retention_days: float | None = Field(
        None, gt=0, description="after how long ended jobs are deleted with their files; default: never"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="of the service's own log: lines of text, or JSON objects"
    )
    secrets_folder: Path | None = Field(
        None,
        description="folder of files `<owner>/<name>` and `shared/<name>` that hold jobs' secrets; every node of the cluster "
        "mounts it at the same path",
    )
    allowed_imports: str | None = Field(
        None,
        description="functions that `import:` models may name, separated by commas: `package.module:function`, or "
        "`package.module:*` for all of a module that holds nothing but model builders",
    )
    allowed_roots: str | None = Field(
        None,
        description="folders and fsspec addresses, separated by commas, that specs may read data from and write checkpoints to",
    )
    grace_seconds: float = Field(
        5,
        ge=0,
        le=3600,
        description="time for a run to show life, or write its outcome, after Ray alone says that it has ended",
    )
    silence_seconds: float = Field(
        60, ge=5, le=3600, description="time without a sign of life after which a run is lost that Ray calls running"
    )
    start_seconds: float = Field(
        900,
        ge=5,
        le=86_400,
        description="time that Ray may take to start what was submitted, before that is tried again",
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

    def permissions(self) -> Allowlist:
        """What the operator allows specs to reach."""
        return Allowlist(imports=_parted(self.allowed_imports), roots=_parted(self.allowed_roots))

    def networks(self) -> tuple[IPNetwork, ...]:
        """Networks that webhooks may reach though they are not public."""
        return read_networks(self.webhook_networks)

    def retention(self) -> timedelta | None:
        """For how long ended jobs are kept; None: for ever."""
        return timedelta(days=self.retention_days) if self.retention_days else None

    @field_validator("webhook_networks")
    @classmethod
    def _holds_networks(cls, text: str | None) -> str | None:
        read_networks(text)
        return text

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        """Ask for an address where the one listened on is none that others can use."""
        if self.host in ("0.0.0.0", "::") and not self.public_url:  # noqa: S104
            raise ValueError(f"public_url must be set where host is {self.host}")
        return self

    def browser_url(self) -> str:
        """Address of this service for browsers."""
        return (self.public_url or f"http://{self.host}:{self.port}").rstrip("/")

    def nodes_url(self) -> str:
        """Address of this service for the nodes of the cluster."""
        return (self.cluster_url or self.browser_url()).rstrip("/")

    @field_validator("allowed_imports")
    @classmethod
    def _names_functions(cls, text: str | None) -> str | None:
        for entry in _parted(text):
            if not re.fullmatch(IMPORT_PATTERN, entry):
                raise ValueError(f"must be `package.module:function` or `package.module:*` (got {entry!r})")
        return text

    @field_validator("trusted_proxies")
    @classmethod
    def _holds_addresses(cls, text: str | None) -> str | None:
        read_networks(text)
        return text

    def replica_name(self) -> str:
        """Name of this process among all that share the database."""
        return self.replica or f"{socket.gethostname()[:70]}-{self.port}"

    def policy(self) -> Policy:
        """By which rules jobs are admitted."""
        return Policy(
            most_active=self.max_active_jobs,
            backfill=timedelta(seconds=self.backfill_seconds),
            patience=timedelta(seconds=self.patience_seconds),
            quotas={owner: Quota(quota.jobs, quota.cpus, quota.gpus) for owner, quota in self.owner_quotas.items()},
            default_quota=Quota(self.quota_jobs, self.quota_cpus, self.quota_gpus),
        )

    def ray_token(self) -> str | None:
        """Ray's token, from wherever it was given. Raises OSError if the file cannot be read."""
        if self.ray_auth_token is not None:
            return self.ray_auth_token.get_secret_value()
        return self.ray_auth_token_path.read_text().strip() if self.ray_auth_token_path else None


def _parted(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())

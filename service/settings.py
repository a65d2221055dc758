"""Settings of the API and dispatcher, read from environment variables."""

import re
import socket
from datetime import timedelta
from pathlib import Path
from typing import Literal, Self

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.domain.access import Owner
from service.domain.lifecycle import Limits
from service.domain.resources import Resources
from service.domain.scheduling import Policy, Quota
from service.domain.webhooks import IPNetwork, read_networks
from trainer.jobspec import IMPORT_PATTERN, Allowlist, FrozenModel


class OwnerQuota(FrozenModel):
    """Limits of one owner's active jobs and submissions."""

    jobs: int | None = Field(None, ge=0)
    cpus: float | None = Field(None, ge=0)
    gpus: float | None = Field(None, ge=0)
    priority: int | None = Field(None, ge=0, le=100)

    def quota(self) -> Quota:
        """Return the quota."""
        return Quota(self.jobs, self.cpus, self.gpus, self.priority)


class Settings(BaseSettings):
    """Settings from `SYNCBN_*` variables and two of Ray.

    A test compares them with docs/configuration.md.
    """

    model_config = SettingsConfigDict(env_prefix="SYNCBN_", frozen=True)

    token: SecretStr | None = Field(
        None,
        min_length=16,
        description="token with scope admin, at least 16 characters; if it is not set, the first start "
        "creates one and prints it",
    )
    metrics_token: SecretStr | None = Field(
        None,
        min_length=16,
        description="token that opens `/metrics` alone, for Prometheus, at least 16 characters",
    )
    host: str = Field("127.0.0.1", description="listen address of the API")
    port: int = Field(8000, ge=1, le=65535, description="listen port of the API")
    database_url: str = Field(
        "sqlite+aiosqlite:///.syncbn/service.db",
        description="`sqlite+aiosqlite:///path` or `postgresql+asyncpg://user:password@host/name`",
    )
    storage: Path = Field(
        Path(".syncbn/storage"),
        description="folder of logs, outcomes and models, mounted at the same path on every node",
    )
    ray_address: str = Field(
        "http://127.0.0.1:8265", description="address of Ray's dashboard, which accepts job submissions"
    )
    public_url: str | None = Field(
        None, description="URL of this service for browsers; default: `http://<host>:<port>`"
    )
    cluster_url: str | None = Field(
        None, description="URL of this service for the nodes of the cluster; default: the public URL"
    )
    mlflow_url: str = Field(
        "http://127.0.0.1:5000", description="URL of MLflow, which only this service should be able to reach"
    )
    mlflow_secret: SecretStr | None = Field(
        None,
        min_length=16,
        description="secret that `mlflow server --app-name syncbn` requires, at least 16 characters",
    )
    trusted_proxies: str | None = Field(
        None,
        description="comma-separated addresses and networks of reverse proxies whose `X-Forwarded-For` is "
        "trusted; "
        "default: none",
    )
    poll_seconds: float = Field(
        0.5,
        gt=0,
        le=60,
        description="interval of the dispatcher's reconcile loop; up to one second after long ticks",
    )
    call_timeout_seconds: float = Field(
        10, gt=0, le=300, description="timeout of one call to Ray, MLflow or the database"
    )
    max_active_jobs: int = Field(
        8, ge=1, description="maximum number of submitted jobs; each uses memory of Ray's head"
    )
    autoscaled_cpus: float = Field(
        0,
        ge=0,
        description="CPUs that Ray's autoscaler may grow the cluster to; 0 without an autoscaler",
    )
    autoscaled_gpus: float = Field(
        0,
        ge=0,
        description="GPUs that Ray's autoscaler may grow the cluster to; 0 without an autoscaler",
    )
    replica: str | None = Field(
        None,
        max_length=80,
        description="name of this replica, unique among those that share the database and constant over "
        "restarts; "
        "default: host name and port",
    )
    lease_seconds: float = Field(
        6,
        ge=1,
        le=600,
        description="seconds without a heartbeat after which other replicas take over a replica's leases",
    )
    backfill_seconds: float = Field(
        300,
        ge=0,
        description="seconds for which smaller jobs may overtake the first job of the queue while it waits "
        "for resources",
    )
    starvation_seconds: float = Field(
        21_600,
        ge=0,
        description="seconds in the queue after which a job goes first, regardless of priorities",
    )
    quota_jobs: int | None = Field(
        None, ge=0, description="maximum number of active (submitted or running) jobs per owner"
    )
    quota_cpus: float | None = Field(
        None, ge=0, description="maximum number of CPUs of an owner's active jobs"
    )
    quota_gpus: float | None = Field(
        None, ge=0, description="maximum number of GPUs of an owner's active jobs"
    )
    quota_priority: int | None = Field(
        None, ge=0, le=100, description="maximum priority of submissions, also of owners with other quotas"
    )
    quota_stored_bytes: int | None = Field(
        1_000_000_000,
        ge=0,
        description="maximum size of an owner's jobs in the database, including ended ones, in bytes",
    )
    owner_quotas: dict[Owner, OwnerQuota] = Field(
        {},
        description='quotas of single owners, as JSON: `{"ann": {"gpus": 8, "priority": 10}}`; missing '
        "fields have no limit",
    )
    rate_per_second: float = Field(50, gt=0, description="sustained requests per second and token")
    rate_burst: int = Field(200, ge=1, description="burst of requests per token")
    check_seconds: float = Field(
        15,
        ge=0,
        le=60,
        description="seconds that a submission may wait for the check of library models, functions and "
        "datasets by a process with "
        "torch; 0 disables the check",
    )
    checker: str | None = Field(
        None,
        pattern=r"^[\w.-]+:\d{1,5}$",
        description="`host:port` of `python -m trainer.check --listen`, where this installation has no "
        "torch; default: the service starts the process",
    )
    streams_per_token: int = Field(
        50, ge=1, description="maximum number of open log and event streams per token and replica"
    )
    max_artifact_bytes: int = Field(
        5_000_000_000, ge=1_000_000, description="maximum size of one artifact of a run, in bytes"
    )
    max_attempt_artifact_bytes: int = Field(
        20_000_000_000,
        ge=1_000_000,
        description="maximum size of all artifacts of an attempt in bytes; a file counts as at least "
        "one million",
    )
    webhook_networks: str | None = Field(
        None,
        description="comma-separated private networks that webhooks may reach, such as `10.1.0.0/16`",
    )
    retention_days: float | None = Field(
        None, gt=0, description="days after which ended jobs and their files are deleted; default: never"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="format of the service's log: `text` or `json`"
    )
    secrets_folder: Path | None = Field(
        None,
        description="folder of secrets, files `<owner>/<name>` and `shared/<name>`, mounted at the same path "
        "on every node of the cluster",
    )
    allowed_imports: str | None = Field(
        None,
        description="comma-separated functions that `import:` models may use: `package.module:function`, or "
        "`package.module:*` for a module that contains only model builders",
    )
    allowed_roots: str | None = Field(
        None,
        description="comma-separated folders and fsspec addresses from which specs may read data and to "
        "which they may write checkpoints",
    )
    outcome_grace_seconds: float = Field(
        5,
        ge=0,
        le=3600,
        description="seconds for a heartbeat or an outcome after Ray has reported the end of an attempt",
    )
    heartbeat_timeout_seconds: float = Field(
        60,
        ge=5,
        le=3600,
        description="seconds without a heartbeat after which a running attempt is considered lost",
    )
    start_timeout_seconds: float = Field(
        900,
        ge=5,
        le=86_400,
        description="seconds that Ray may take to start a submission before it is retried",
    )
    stop_grace_seconds: float = Field(
        60,
        ge=0,
        le=3600,
        description="seconds for a paused or preempted attempt to save a checkpoint before it is stopped",
    )
    ray_auth_token: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("RAY_AUTH_TOKEN", "ray_auth_token"),
        description="Ray's authentication token",
    )
    ray_auth_token_path: Path | None = Field(
        None,
        validation_alias=AliasChoices("RAY_AUTH_TOKEN_PATH", "ray_auth_token_path"),
        description="file with Ray's authentication token",
    )

    def permissions(self) -> Allowlist:
        """Imports, folders and addresses that specs may use."""
        return Allowlist(imports=_split(self.allowed_imports), roots=_split(self.allowed_roots))

    def networks(self) -> tuple[IPNetwork, ...]:
        """Private networks that webhooks may reach."""
        return read_networks(self.webhook_networks)

    def retention(self) -> timedelta | None:
        """Time for which ended jobs are kept; None means for ever."""
        return timedelta(days=self.retention_days) if self.retention_days else None

    @field_validator("webhook_networks")
    @classmethod
    def _holds_networks(cls, text: str | None) -> str | None:
        read_networks(text)
        return text

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        """Require a public URL if the listen address is a wildcard."""
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
        for entry in _split(text):
            if not re.fullmatch(IMPORT_PATTERN, entry):
                raise ValueError(f"must be `package.module:function` or `package.module:*` (got {entry!r})")
        return text

    @field_validator("trusted_proxies")
    @classmethod
    def _holds_addresses(cls, text: str | None) -> str | None:
        read_networks(text)
        return text

    def replica_name(self) -> str:
        """Name of this replica."""
        return self.replica or f"{socket.gethostname()[:70]}-{self.port}"

    def checker_address(self) -> tuple[str, int] | None:
        """Host and port of the process that checks specs; None if the service starts it."""
        if self.checker is None:
            return None
        host, _, port = self.checker.rpartition(":")
        return host, int(port)

    def limits(self) -> Limits:
        """Return the time limits of attempts."""
        return Limits(
            outcome_grace_seconds=self.outcome_grace_seconds,
            heartbeat_timeout_seconds=self.heartbeat_timeout_seconds,
            start_timeout_seconds=self.start_timeout_seconds,
            stop_grace_seconds=self.stop_grace_seconds,
        )

    def policy(self) -> Policy:
        """Rules of admission."""
        return Policy(
            max_active=self.max_active_jobs,
            backfill=timedelta(seconds=self.backfill_seconds),
            starvation=timedelta(seconds=self.starvation_seconds),
            quotas={owner: quota.quota() for owner, quota in self.owner_quotas.items()},
            default_quota=Quota(self.quota_jobs, self.quota_cpus, self.quota_gpus, self.quota_priority),
            autoscaled=Resources(self.autoscaled_cpus, self.autoscaled_gpus),
        )

    def ray_token(self) -> str | None:
        """Ray's authentication token. Raises OSError if its file cannot be read."""
        if self.ray_auth_token is not None:
            return self.ray_auth_token.get_secret_value()
        return self.ray_auth_token_path.read_text().strip() if self.ray_auth_token_path else None


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())

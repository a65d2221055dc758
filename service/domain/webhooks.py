"""Webhooks: filters, signatures, retries, and public addresses.

Messages are signed by the library of Standard Webhooks 1.0.0 (standardwebhooks.com), with which receivers
check them.
"""

import base64
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import standardwebhooks
from pydantic import Field

from service.domain.jobs import Job, JobState
from trainer.jobspec import FrozenModel

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
SECRET_PREFIX = "whsec_"  # noqa: S105 - what a secret begins with, by the standard
PAUSES_SECONDS = (5, 30, 120, 600, 1_800, 7_200, 18_000, 36_000)
"""Pauses between the attempts to deliver a message; it is given up about 18 hours after the first one."""
TRANSLATED = IPv6Network("64:ff9b::/96")
"""IPv4 addresses in NAT64 notation (RFC 6052)."""
PUBLIC_IPV6 = IPv6Network("2000::/3")
"""Global unicast addresses of IPv6 (RFC 4291). Embedded IPv4 addresses lie outside of it."""
NOT_PUBLIC = tuple(
    map(
        ip_network,
        (
            "168.63.129.16/32",  # the host of an Azure machine
            "192.0.0.0/24",  # protocols' own (RFC 6890), and a cloud's metadata
            "192.88.99.0/24",  # relays of 6to4 (RFC 7526)
            "2001::/23",  # protocols' own, Teredo among them, which wraps IPv4 addresses (RFC 4380)
            "2001:db8::/32",  # documentation (RFC 3849)
            "2002::/16",  # 6to4, which wraps IPv4 addresses (RFC 3056)
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)
"""Addresses that some or all versions of Python wrongly report as global."""


class Threshold(FrozenModel):
    """Value of a metric at which a job is reported, once."""

    metric: Annotated[str, Field(min_length=1, max_length=200)]
    relation: Literal["at_least", "at_most"]
    bound: Annotated[float, Field(allow_inf_nan=False)]

    def is_met(self, value: float) -> bool:
        """Return whether a value meets the threshold; NaN does not."""
        return value >= self.bound if self.relation == "at_least" else value <= self.bound

    def __str__(self) -> str:
        """Return the threshold in words, which identify its messages."""
        return f"{self.metric} {self.relation.replace('_', ' ')} {self.bound!r}"


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """Address of an owner, and filters of the jobs to report."""

    id: str
    owner: str
    url: str
    secret: str
    """Key that signs the messages; stored in plain text, since signing needs it."""
    states: tuple[JobState, ...]
    """Terminal states that cause a message."""
    thresholds: tuple[Threshold, ...] = ()
    tag: str | None = None
    """Tag of the jobs; None means all jobs."""
    created_at: datetime

    @property
    def host(self) -> str:
        """Scheme and host of the address, whose path may be secret."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}"

    def is_about(self, job: Job) -> bool:
        """Return whether the webhook reports a job."""
        return job.owner == self.owner and (self.tag is None or self.tag in job.tags)


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Message to send.

    Its id is constant over all attempts, so that receivers can ignore duplicates.
    """

    id: str
    webhook_id: str
    job_id: str
    about: str
    """State or threshold that the message reports; a webhook gets one message about each per job."""
    body: str
    created_at: datetime
    due_at: datetime
    attempts: int = 0
    ended_at: datetime | None = None
    """Time at which the message was delivered or given up."""
    is_delivered: bool = False
    answer: str = ""
    """Response to the last attempt, or its error."""


def new_webhook_secret() -> str:
    """Return a new secret of 256 random bits."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def signed_headers(secret: str, message_id: str, at: datetime, body: str) -> dict[str, str]:
    """Return the headers of a message that is sent at a time, which must be in UTC."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": standardwebhooks.Webhook(secret).sign(message_id, at, body),
    }


def write_message(
    job: Job, at: datetime, met: Threshold | None = None, step: int = 0, value: float = 0.0
) -> str:
    """Return the JSON body of a message.

    It is about the end of a job, or the threshold that was `met`.
    """
    data: dict[str, Any] = {
        "job_id": job.id,
        "name": job.name,
        "owner": job.owner,
        "tags": list(job.tags),
        "comparison_id": job.comparison_id,
        "variant": job.variant,
        "attempt": job.attempt,
        "state": job.state.value,
        "reason": job.reason,
        "mlflow_run_id": job.mlflow_run_id,
    }
    if met is not None:
        data["threshold"] = met.model_dump() | {
            "step": step,
            "value": value if math.isfinite(value) else str(value),
        }
    kind = f"job.{job.state.value}" if met is None else "job.threshold"
    return json.dumps({"type": kind, "timestamp": at.isoformat(), "data": data})


def pause_after(attempts: int) -> int | None:
    """Return the seconds until the next try, or None if the message is dropped."""
    return PAUSES_SECONDS[attempts - 1] if attempts <= len(PAUSES_SECONDS) else None


def may_be_reached(address: IPAddress, allowed: Sequence[IPNetwork]) -> bool:
    """Return whether an address is public or in an allowed network.

    An IPv4 address that is only written as one of IPv6 is judged as what it is.
    """
    address = _unwrapped(address)
    if is_in(address, allowed):
        return True
    if isinstance(address, IPv6Address) and address not in PUBLIC_IPV6:
        return False
    return address.is_global and not address.is_multicast and not is_in(address, NOT_PUBLIC)


def is_in(address: IPAddress, networks: Sequence[IPNetwork]) -> bool:
    """Return whether one of the networks contains an address."""
    address = _unwrapped(address)
    return any(address.version == network.version and address in network for network in networks)


def _unwrapped(address: IPAddress) -> IPAddress:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in TRANSLATED:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def read_networks(text: str | None) -> tuple[IPNetwork, ...]:
    """Read networks such as `10.0.0.0/8`, separated by commas. Raises ValueError."""
    return tuple(ip_network(part.strip()) for part in (text or "").split(",") if part.strip())

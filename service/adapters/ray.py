"""Ray client of the service: submissions over the Ray Jobs REST API.

HTTP rather than Ray's client class, because that has no time limits, and follows RAY_ADDRESS rather than the
address it is given.
"""

import asyncio
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx

from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.lifecycle import RayStatus, Submission
from service.domain.resources import Cluster, Node, Resources
from trainer.jobspec import JOB_VARIABLE

ENTRYPOINT = "python -m trainer"
"""Command that Ray runs in a shell. It is the same for every job; everything a user wrote is in the task
file.
"""
STOP_TIMEOUT_SECONDS = 10
"""Time between SIGINT and SIGKILL when a driver is stopped."""


class RayJobs(Protocol):
    """Interface to submissions in Ray.

    All calls raise UpstreamUnavailable after a timeout.
    """

    async def submit(self, submission_id: str, task_file: Path) -> None:
        """Submit an attempt by its task file, once. Raises UpstreamRejected."""

    async def find(self, submission_id: str) -> Submission | None:
        """Return a submission; None if Ray does not know it."""

    async def stop(self, submission_id: str) -> None:
        """Stop a running submission; no effect on ended or unknown ones."""

    async def logs(self, submission_id: str) -> str:
        """Return the early output of the driver, before it writes to the storage."""

    async def cluster(self) -> Cluster:
        """Return total and free resources of all live nodes."""


class RayJobsOverHttp:
    """RayJobs over the REST API of a cluster."""

    def __init__(self, address: str, token: str | None, timeout_seconds: float) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout_seconds = timeout_seconds
        self._submissions: dict[str, str | None] = {}
        """Submission id by Ray's job id, for jobs with placement groups; None if Ray started the job without
        one.
        """
        self._http = httpx.AsyncClient(
            base_url=address, headers=headers, timeout=timeout_seconds, trust_env=False
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(self, submission_id: str, task_file: Path) -> None:
        """Submit an attempt by its task file, once."""
        variables = {
            JOB_VARIABLE: str(task_file),
            # Ray Train stops its workers cleanly on SIGINT alone, and Ray's 3 seconds are too few for that.
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT_SECONDS),
        }
        body = {
            "entrypoint": ENTRYPOINT,
            "submission_id": submission_id,
            "runtime_env": {"env_vars": variables},
        }
        answer = await self._call("POST", "/api/jobs/", json=body)
        # Ray answers a repeated submission id with 500, like any other fault: look whether it has it.
        if answer.is_error and await self.find(submission_id) is None:
            raise UpstreamRejected(
                f"Ray refused the submission with {answer.status_code}: {answer.text.strip()[-200:]}"
            )

    async def find(self, submission_id: str) -> Submission | None:
        """Return a submission; None if Ray does not know it."""
        answer = await self._call("GET", f"/api/jobs/{submission_id}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        content = self._content(answer)
        with _understood(answer):
            return Submission(RayStatus(content["status"]), content.get("message") or "")

    async def stop(self, submission_id: str) -> None:
        """Stop a running submission; no effect on ended or unknown ones."""
        answer = await self._call("POST", f"/api/jobs/{submission_id}/stop")
        if answer.status_code != httpx.codes.NOT_FOUND:
            self._content(answer)

    async def logs(self, submission_id: str) -> str:
        """Return the early output of the driver, before it writes to the storage."""
        answer = await self._call("GET", f"/api/jobs/{submission_id}/logs")
        return "" if answer.status_code == httpx.codes.NOT_FOUND else str(self._content(answer)["logs"])

    async def cluster(self) -> Cluster:
        """Return total and free resources, and the submissions that have theirs.

        What is in use is as Ray's monitor saw it last, some seconds ago at most; without a monitor, nothing
        is reported as in use.
        """
        listed, status, placed = await asyncio.gather(
            self._call("GET", "/api/v0/nodes", params={"detail": "true", "limit": "10000"}),
            self._call("GET", "/api/cluster_status"),
            self._placed(),
        )
        answer, usage = self._content(listed), self._content(status)
        with _understood(answer):
            alive = [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]
            total = {node["node_id"]: node["resources_total"] for node in alive}
            addresses = {node["node_id"]: str(node["node_ip"]) for node in alive}
        with _understood(usage):
            report = ((usage["data"].get("clusterStatus") or {}).get("loadMetricsReport") or {}).get(
                "usageByNode"
            ) or {}
            used = {node: {name: amount for name, (amount, _) in by.items()} for node, by in report.items()}
        free = {
            node: {
                name: math.floor(by.get(name, 0) - used.get(node, {}).get(name, 0)) for name in ("CPU", "GPU")
            }
            for node, by in total.items()
        }
        nodes = [
            Node(addresses[node], _sum([by]), _sum([free[node]]), int(by.get("memory", 0)), _accelerator(by))
            for node, by in total.items()
        ]
        memory = max((node.memory_bytes for node in nodes), default=0)
        return Cluster(
            _sum(total.values()),
            _sum(free.values()),
            placed,
            memory or None,
            tuple(sorted(nodes, key=lambda node: node.address)),
        )

    async def _placed(self) -> frozenset[str]:
        """Return the submissions whose placement group is created."""
        created = {
            "filter_keys": "state",
            "filter_predicates": "=",
            "filter_values": "CREATED",
            "limit": "10000",
        }
        answer = self._content(await self._call("GET", "/api/v0/placement_groups", params=created))
        with _understood(answer):
            creators = {group["creator_job_id"] for group in answer["data"]["result"]["result"]}
        if creators - self._submissions.keys():
            listed = self._content(await self._call("GET", "/api/jobs/"))
            with _understood(listed):
                self._submissions |= {job["job_id"]: job["submission_id"] for job in listed}
        self._submissions = {job: name for job, name in self._submissions.items() if job in creators}
        return frozenset(filter(None, self._submissions.values()))

    async def _call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            # httpx limits each wait on the network; this limits the call as a whole.
            async with asyncio.timeout(self._timeout_seconds):
                return await self._http.request(method, path, **arguments)
        except (httpx.HTTPError, TimeoutError) as error:
            raise UpstreamUnavailable(
                f"Ray at {self._http.base_url} did not answer: {error or type(error).__name__}"
            ) from error

    @staticmethod
    def _content(answer: httpx.Response) -> Any:
        if answer.is_error:
            raise UpstreamUnavailable(f"Ray answered {answer.status_code}: {answer.text.strip()[:200]}")
        with _understood(answer.text):
            return answer.json()


def _sum(nodes: Iterable[Mapping[str, float]]) -> Resources:
    each = [Resources(cpus=node.get("CPU", 0), gpus=node.get("GPU", 0)) for node in nodes]
    return sum(each, start=Resources())


def _accelerator(resources: Mapping[str, float]) -> str | None:
    """Return the type of a node's GPUs, which Ray shows as the name of a resource."""
    prefix = "accelerator_type:"
    return next((name.removeprefix(prefix) for name in resources if name.startswith(prefix)), None)


@contextmanager
def _understood(answer: object) -> Iterator[None]:
    """Convert answers that are not Ray's to UpstreamUnavailable."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UpstreamUnavailable(f"Ray answered what is not understood: {str(answer)[:200]}") from error

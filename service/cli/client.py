"""Typed client of the HTTP API; knows only HTTP and the schemas."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.api.access_schemas import AuditList, AuditView, CallerView, MadeToken, TokenList, TokenView
from service.api.schemas import ComparisonView, Curves, EventList, JobList, JobView, Problem, Readiness, Report

M = TypeVar("M", bound=BaseModel)


class ApiError(Exception):
    """The API refused a request, or could not be reached; `problem` is its answer, if there is one."""

    def __init__(self, message: str, problem: Problem | None = None) -> None:
        super().__init__(message)
        self.problem = problem


class Client:
    """Calls the API at `url` with a bearer token. Every call ends within `timeout_seconds` and raises ApiError if it fails."""

    def __init__(self, url: str, token: str, timeout_seconds: float = 30) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit_job(self, name: str, spec: dict[str, Any]) -> JobView:
        """Submit one job; `spec` as in JobSpec, and checked by the service."""
        return self._read(JobView, "POST", "/v1/jobs", json={"name": name, "spec": spec})

    def job(self, job_id: str) -> JobView:
        """Show one job."""
        return self._read(JobView, "GET", f"/v1/jobs/{job_id}")

    def jobs(self, page_size: int = 100) -> Iterator[JobView]:
        """Go through all jobs, newest first."""
        token: str | None = None
        while True:
            page = self._read(JobList, "GET", "/v1/jobs", params=_query(page_size, token))
            yield from page.jobs
            if (token := page.next_page_token) is None:
                return

    def cancel(self, job_id: str) -> JobView:
        """Ask for a job to be cancelled."""
        return self._read(JobView, "POST", f"/v1/jobs/{job_id}:cancel")

    def events(self, job_id: str) -> EventList:
        """List a job's transitions."""
        return self._read(EventList, "GET", f"/v1/jobs/{job_id}/events")

    def logs(self, job_id: str) -> str:
        """Read the log of a job's last attempt."""
        return self._call("GET", f"/v1/jobs/{job_id}/logs").text

    def submit_comparison(self, body: dict[str, Any]) -> ComparisonView:
        """Submit a comparison; `body` as in SubmitComparison, and checked by the service."""
        return self._read(ComparisonView, "POST", "/v1/comparisons", json=body)

    def comparison(self, comparison_id: str) -> ComparisonView:
        """Show a comparison and its jobs."""
        return self._read(ComparisonView, "GET", f"/v1/comparisons/{comparison_id}")

    def report(self, comparison_id: str, *, curves: bool = False) -> Report:
        """Read a comparison's report, with each run's curve if asked for."""
        return self._read(Report, "GET", f"/v1/comparisons/{comparison_id}/report", params={"curves": curves})

    def curves(self, comparison_id: str, metric: str) -> Curves:
        """Read one metric of all runs of a comparison."""
        return self._read(Curves, "GET", f"/v1/comparisons/{comparison_id}/curves", params={"metric": metric})

    def me(self) -> CallerView:
        """Ask whose token this is, and what it allows."""
        return self._read(CallerView, "GET", "/v1/me")

    def create_token(
        self, owner: str, scopes: Sequence[str], name: str, expires_in_seconds: int | None = None
    ) -> MadeToken:
        """Make a token; the answer alone holds its secret."""
        body = {"owner": owner, "scopes": list(scopes), "name": name, "expires_in_seconds": expires_in_seconds}
        return self._read(MadeToken, "POST", "/v1/tokens", json=body)

    def tokens(self, page_size: int = 100) -> Iterator[TokenView]:
        """Go through all tokens, newest first."""
        token: str | None = None
        while True:
            page = self._read(TokenList, "GET", "/v1/tokens", params=_query(page_size, token))
            yield from page.tokens
            if (token := page.next_page_token) is None:
                return

    def revoke_token(self, token_id: str) -> TokenView:
        """Let a token open nothing from now on."""
        return self._read(TokenView, "POST", f"/v1/tokens/{token_id}:revoke")

    def audit(self, page_size: int = 100) -> Iterator[AuditView]:
        """Go through all that was done with tokens, newest first."""
        token: str | None = None
        while True:
            page = self._read(AuditList, "GET", "/v1/audit", params=_query(page_size, token))
            yield from page.records
            if (token := page.next_page_token) is None:
                return

    def ready(self) -> Readiness:
        """Ask what the service depends on; also when not all of it answers."""
        return self._read(Readiness, "GET", "/readyz", accept=(200, 503))

    def wait(
        self, comparison_id: str, timeout_seconds: float, watch: Callable[[ComparisonView], None]
    ) -> ComparisonView:
        """Wait until all jobs of a comparison have ended, showing each look at it to `watch`. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            comparison = self.comparison(comparison_id)
            watch(comparison)
            if all(job.state.is_terminal for job in comparison.jobs):
                return comparison
            if time.monotonic() > deadline:
                raise TimeoutError(f"{comparison_id} has not ended within {timeout_seconds:g} seconds")
            time.sleep(0.5)

    def _read(self, kind: type[M], method: str, path: str, accept: tuple[int, ...] = (), **arguments: Any) -> M:
        answer = self._call(method, path, accept, **arguments)
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            raise ApiError(f"{self.url} did not answer as a syncbn service does: {error}") from error

    def _call(self, method: str, path: str, accept: tuple[int, ...] = (), **arguments: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise ApiError(f"{self.url} does not answer: {error}") from error
        if answer.is_success or answer.status_code in accept:
            return answer
        try:
            problem = Problem.model_validate_json(answer.content)
        except ValidationError:
            raise ApiError(f"{self.url} answered {answer.status_code}: {answer.text[:200]}") from None
        raise ApiError(problem.detail, problem)


def _query(page_size: int, token: str | None) -> dict[str, Any]:
    return {"page_size": page_size} | ({"page_token": token} if token else {})

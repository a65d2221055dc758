"""Page that submits jobs and comparisons: recipes, a form, the same as YAML."""

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from service.api.dependencies import JOB, Checks, Comparisons, Jobs, MlflowUrl, Ray, WakeDispatcher
from service.api.idempotency import answer_once
from service.api.json_body import in_thread
from service.api.routes.comparisons import submit_comparison
from service.api.routes.jobs import Add, submit_job
from service.api.schemas import SubmitComparison, SubmitJob
from service.api.web.drafts import Check, Draft, Errors, check_draft, read_draft
from service.api.web.forms import Form, read_form, validated
from service.api.web.pages import PageRoute, Submitter, page, see
from service.domain.access import Caller
from service.domain.errors import NotFound, RequestInProgress
from service.domain.recipes import Recipe, read_recipes

SIMILAR_JOBS = 30
"""Newest succeeded jobs that an estimated time is made from."""
REPEAT_SECONDS, RETRY_SECONDS = 10.0, 0.1
"""Time in which a repeated form waits for the answer to the first one, and between two attempts."""
KEY_BYTES = 16
EXAMPLE = Draft({"name": "first-try", "spec": {"steps": 500, "data": {"name": "digits"}}})

router = APIRouter(prefix="/submit", include_in_schema=False, route_class=PageRoute)


@dataclass(frozen=True)
class Submissions:
    """What a submission needs, besides its body."""

    checks: Checks
    comparison_store: Comparisons
    mlflow_url: MlflowUrl
    wake: WakeDispatcher
    add: Add
    response: Response

    async def __call__(self, body: SubmitJob | SubmitComparison, caller: Caller) -> str:
        """Submit, and return the address of the page of what was made."""
        if isinstance(body, SubmitJob):
            return f"/jobs/{(await submit_job(body, caller, self.checks, self.add)).id}"
        made = await submit_comparison(
            body,
            caller,
            self.checks,
            self.comparison_store,
            self.mlflow_url,
            self.wake,
            self.response,
        )
        return f"/comparisons/{made.id}"


async def submit_once(
    request: Request, caller: Caller, form: Form, submit: Callable[[], Awaitable[str]]
) -> Response:
    """Submit, and lead to the page of the result, also when repeated.

    Raises RequestInProgress if the first request takes longer than `REPEAT_SECONDS`.
    """

    async def handle(_: Request) -> Response:
        return see(await submit())

    if not form.text("key"):
        return await handle(request)
    # The digest of all fields: a draft that was changed after the browser went back is another submission.
    key = f"form-{hashlib.sha256(await request.body()).hexdigest()}"
    deadline = time.monotonic() + REPEAT_SECONDS
    while True:
        try:
            return await answer_once(request, caller, key, handle)
        except RequestInProgress:  # a double click: the browser shows only the answer to the second one
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(RETRY_SECONDS)


@dataclass(frozen=True)
class Preset:
    """Recipe's comparison, with the number of its runs."""

    name: str
    runs: int


@cache
def recipes() -> dict[str, Recipe]:
    """Return all recipes by name, which are read once."""
    return {recipe.name: recipe for recipe in read_recipes()}


def presets_of(recipe: Recipe) -> list[Preset]:
    """Return the presets of a recipe."""
    return [
        Preset(name, math.prod(len(values) for values in comparison.axes.values()))
        for name, comparison in recipe.presets.items()
    ]


@router.get("")
async def show_form(
    request: Request,
    caller: Submitter,
    job_store: Jobs,
    recipe: str | None = None,
    preset: str = "quick",
    job: Annotated[str | None, Query(pattern=JOB)] = None,
) -> Response:
    """Show the form: an example, a preset of a recipe, or the spec of a job."""
    draft = EXAMPLE
    if recipe is not None:
        draft = Draft((await _preset(recipe, preset)).model_dump(mode="json", exclude_unset=True))
    elif job is not None:
        old = await job_store.get(job, caller.sees_only)
        spec = old.spec.model_dump(mode="json", exclude_defaults=True)
        draft = Draft({"name": old.name, "tags": list(old.tags), "spec": spec})
    return await _form_page(request, caller, draft)


@router.post("/recipe")
async def submit_recipe(
    request: Request, caller: Submitter, submit: Annotated[Submissions, Depends()]
) -> Response:
    """Submit a preset of a recipe."""
    form = await read_form(request)
    body = await _preset(form.text("recipe"), form.text("preset"))
    return await submit_once(request, caller, form, partial(submit, body, caller))


@router.post("")
async def handle_form(
    request: Request,
    caller: Submitter,
    job_store: Jobs,
    ray: Ray,
    submit: Annotated[Submissions, Depends()],
) -> Response:
    """Check, submit or show the draft of the form, by the button that was used."""
    form = await read_form(request)
    action, view = form.text("action"), form.text("view") or "form"
    draft = Draft({})
    try:
        draft = await read_draft(form)
        if action == "submit":
            return await submit_once(request, caller, form, partial(submit, draft.request(), caller))
        check = None
        if action == "check":
            ended = await job_store.newest_succeeded(SIMILAR_JOBS, caller.sees_only)
            check = await check_draft(draft, caller, submit.checks, ray, ended)
    except Errors as error:
        failed = Check.failed(request, error)
        # A check is no failure of the page, and htmx would not show one.
        status = 200 if action == "check" else 422
        return await _form_page(request, caller, draft, failed, form, view=view, status=status)
    view = {"as_yaml": "yaml", "as_form": "form"}.get(action, view)
    return await _form_page(request, caller, draft, check, form, view=view)


async def _preset(name: str, preset: str) -> SubmitComparison:
    """Return the request of a preset. Raises NotFound."""
    recipe = (await in_thread(recipes)).get(name)
    if recipe is None or preset not in recipe.presets:
        raise NotFound(f"there is no recipe {name[:80]!r} with a preset {preset[:80]!r}")
    return await in_thread(validated, SubmitComparison, recipe.request(preset))


async def _form_page(
    request: Request,
    caller: Caller,
    draft: Draft,
    check: Check | None = None,
    form: Form | None = None,
    *,
    view: str = "form",
    status: int = 200,
) -> Response:
    known = await in_thread(recipes)
    return page(
        request,
        "submit.html",
        caller,
        status=status,
        draft=draft,
        check=check,
        view=view,
        key=secrets.token_urlsafe(KEY_BYTES),
        # What could not be read is shown as it was written.
        written={name: values[0] for name, values in (form or {}).items()} if check and check.errors else {},
        recipes=[(recipe, presets_of(recipe)) for recipe in known.values()],
    )

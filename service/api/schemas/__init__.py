"""Bodies of requests and answers."""

from service.api.schemas.comparisons import ComparisonView, SubmitComparison
from service.api.schemas.health import Check, Readiness
from service.api.schemas.jobs import (
    ChangeJob,
    EventList,
    EventView,
    JobList,
    JobSummaryView,
    JobView,
    Needs,
    SubmitJob,
    Validation,
)
from service.api.schemas.names import Name
from service.api.schemas.problems import FieldError, Problem
from service.api.schemas.reports import Curves, Report, RunCurve, SpreadView, VariantReport

__all__ = [
    "ChangeJob",
    "Check",
    "ComparisonView",
    "Curves",
    "EventList",
    "EventView",
    "FieldError",
    "JobList",
    "JobSummaryView",
    "JobView",
    "Name",
    "Needs",
    "Problem",
    "Readiness",
    "Report",
    "RunCurve",
    "SpreadView",
    "SubmitComparison",
    "SubmitJob",
    "Validation",
    "VariantReport",
]

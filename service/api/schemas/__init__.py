"""Bodies of requests and answers."""

from service.api.schemas.cluster import Check, Readiness
from service.api.schemas.comparisons import (
    ComparisonList,
    ComparisonSummaryView,
    ComparisonView,
    SubmitComparison,
)
from service.api.schemas.jobs import (
    ChangeJob,
    EventList,
    EventView,
    JobList,
    JobSummaryView,
    JobView,
    SubmitJob,
    Validation,
)
from service.api.schemas.names import Name
from service.api.schemas.problems import FieldError, Problem
from service.api.schemas.reports import Curves, Report, RunCurve, SpreadView, VariantReport
from service.api.schemas.verdicts import FindingView, IntervalView, VerdictView

__all__ = [
    "ChangeJob",
    "Check",
    "ComparisonList",
    "ComparisonSummaryView",
    "ComparisonView",
    "Curves",
    "EventList",
    "EventView",
    "FieldError",
    "FindingView",
    "IntervalView",
    "JobList",
    "JobSummaryView",
    "JobView",
    "Name",
    "Problem",
    "Readiness",
    "Report",
    "RunCurve",
    "SpreadView",
    "SubmitComparison",
    "SubmitJob",
    "Validation",
    "VariantReport",
    "VerdictView",
]

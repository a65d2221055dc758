import io
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from service.api.schemas import JobSummaryView, JobView, Report
from service.cli.output import SafeConsole
from service.cli.progress import JobBars
from service.cli.report_tables import report_table, save_plot, verdict_table
from service.cli.tables import job_view, jobs_table
from service.domain.jobs import JobState
from service.domain.recipes import Recipe
from service.domain.reports import make_report
from service.domain.verdicts import Run, judge
from tests.service.examples import make_comparison, make_job

GLOO = "worker 0: RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [batch]"


def render(content):
    file = io.StringIO()
    Console(file=file, width=300).print(content)
    return file.getvalue()


def views():
    jobs = [
        make_job(name="a [bold] name", state=JobState.FAILED, reason=GLOO),
        make_job(reason="needs 8 CPUs, but the whole cluster has 2 CPUs and 0 GPUs"),
    ]
    return [JobView.of(job, "http://mlflow") for job in jobs]


def test_what_others_wrote_is_shown_as_it_is():
    shown = views()
    text = render(jobs_table(shown))
    assert GLOO in text
    assert "a [bold] name" in text


def test_bars_say_why_a_job_waits_or_failed():
    shown = views()
    bars = JobBars()
    bars.show(shown)
    text = render(bars._progress.get_renderable())
    assert "needs 8 CPUs" in text
    assert GLOO in text


def ended_jobs():
    return [
        make_job(
            spec=make_job().spec.model_copy(update={"seed": seed}),
            variant={"norm": norm, "seed": seed},
            state=JobState.SUCCEEDED,
        )
        for norm in ("none", "sync")
        for seed in (0, 1, 2)
    ]


def cells(text, label):
    row = next(line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in row.strip("│").split("│")]


@pytest.mark.parametrize("metric", ["test_loss", "calibration_error"])
def test_a_report_on_a_metric_that_is_to_fall(tmp_path, metric):
    jobs = ended_jobs()
    curves = {job.id: [(0, 2.3), (100 if job.variant["norm"] == "sync" else 1000, 0.25)] for job in jobs}
    comparison = make_comparison(metric=metric, target=None)
    report = Report.of(make_report(comparison, jobs, [job.spec for job in jobs], curves), with_curves=True)
    assert (report.direction, report.target) == ("min", 0.25)
    text = render(report_table(report))
    assert f"steps to {metric} ≤ 0.25 (the baseline's best)" in text
    assert cells(text, "norm=sync") == ["norm=sync", "3 of 3", "100", "0.250", "0.250", "10.0×", "faster"]
    save_plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_is_a_row_per_variant_and_a_plot(tmp_path):
    comparison, jobs = make_comparison(), ended_jobs()
    curves = {job.id: [(0, 0.1), (100 if job.variant["norm"] == "sync" else 1000, 0.85)] for job in jobs}
    report = Report.of(make_report(comparison, jobs, [job.spec for job in jobs], curves), with_curves=True)
    text = render(report_table(report))
    assert "steps to accuracy ≥ 0.8" in text
    assert cells(text, "norm=sync") == [
        "norm=sync",
        "3 of 3",
        "100",
        "0.850",
        "0.850",
        "10.0×",
        "faster",
    ]
    save_plot(report, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_warnings_are_shown_below_a_report():
    jobs = [
        make_job(spec=job.spec.model_copy(update={"accumulate": 2}), variant=job.variant, state=job.state)
        for job in ended_jobs()
    ]
    report = Report.of(
        make_report(make_comparison(), jobs, [job.spec for job in jobs], {job.id: [(0, 0.9)] for job in jobs}),
        with_curves=False,
    )
    assert "Warning: accumulate: under norm 'sync' the statistics are of each part" in render(report_table(report))


@pytest.mark.parametrize(("seeds", "is_warned"), [(1, False), (2, True), (3, False)])
def test_a_report_of_two_seeds_says_that_they_are_too_few(seeds, is_warned):
    jobs = [job for job in ended_jobs() if job.variant["seed"] < seeds]
    curves = {job.id: [(100 if job.variant["norm"] == "sync" else 1000, 0.85)] for job in jobs}
    report = Report.of(make_report(make_comparison(), jobs, [job.spec for job in jobs], curves), with_curves=False)
    assert ("seed: faster and slower take at least 3 seeds (got 2)" in report.warnings) == is_warned
    verdict = {1: "faster on one seed", 2: "no clear difference", 3: "faster"}[seeds]
    assert report.variants[1].verdict == verdict


def test_failed_runs_are_counted_in_the_report():
    comparison = make_comparison()
    jobs = [
        make_job(variant={"norm": "none", "seed": 0}, state=JobState.SUCCEEDED),
        make_job(variant={"norm": "sync", "seed": 0}, state=JobState.FAILED),
    ]
    report = Report.of(
        make_report(comparison, jobs, [job.spec for job in jobs], {job.id: [(0, 0.9)] for job in jobs}),
        with_curves=False,
    )
    assert report.variants[1].failed == 1
    assert report.variants[1].verdict == "runs failed"
    assert "1 of 1, 1 failed" in render(report_table(report))


def test_a_verdict_is_a_row_per_rule():
    recipe = Recipe.model_validate(
        dict.fromkeys(("claim", "source", "paper", "falsified_if"), "words")
        | {
            "name": "example",
            "presets": {"quick": {"spec": {"steps": 10}, "matrix": {"norm": ["none", "sync"]}}},
            "verdict": [
                {
                    "says": "steps, none / sync",
                    "measure": {"take": "steps_to", "level": 0.8},
                    "of": {"norm": "none"},
                    "against": {"norm": "sync"},
                    "by": "ratio",
                    "relation": "at_least",
                    "bound": 5,
                }
            ],
        }
    )
    never, soon = [(0, 0.1), (1000, 0.7)], [(0, 0.1), (100, 0.85)]
    runs = [
        Run(variant={"norm": norm}, seed=seed, curves={"accuracy": curve})
        for seed in (0, 1, 2)
        for norm, curve in (("none", never), ("sync", soon))
    ]
    text = render(verdict_table(recipe, judge(recipe, runs)))
    assert "the claim holds" in text
    row = next(line for line in text.splitlines() if "none / sync" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "steps, none / sync", "≥ 1,000", "100", "≥ 10", "10 to inf", "at least 5", "holds",
    ]  # fmt: skip
    assert "–" in render(verdict_table(recipe, judge(recipe, runs[:1])))


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_text_of_a_user_steers_the_terminal(name, reason):
    job = make_job(name=name, reason=reason, state=JobState.FAILED)
    for content in (job_view(JobView.of(job, "http://x"), []), jobs_table([JobSummaryView.of(job, "http://x")])):
        file = io.StringIO()
        SafeConsole(file=file, width=200, highlight=False).print(content)
        assert not [letter for letter in file.getvalue() if unicodedata.category(letter) == "Cc" and letter != "\n"]

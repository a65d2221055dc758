import pytest

from service.api.schemas import Report, VerdictView
from service.cli.report_tables import report_table, save_plot, sparkline, verdict_table, watched
from service.domain.jobs import JobState
from service.domain.reports import make_report
from service.domain.verdicts import Run, judge
from tests.service.cli.rendering import render
from tests.service.domain.recipe_factory import FASTER, make_recipe
from tests.service.examples import make_comparison, make_job


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
def test_a_report_of_a_metric_that_decreases(tmp_path, metric):
    jobs = ended_jobs()
    steps = {job.id: 100 if job.variant["norm"] == "sync" else 1000 for job in jobs}
    curves = {job: [(0, 2.3), (step - 1, 0.5), (step, 0.25)] for job, step in steps.items()}
    comparison = make_comparison(metric=metric, target=None)
    report = Report.of(make_report(comparison, jobs, [job.spec for job in jobs], curves), with_curves=True)
    assert (report.direction, report.target) == ("min", 0.25)
    text = render(report_table(report))
    assert f"steps to {metric} ≤ 0.25 (the baseline's best)" in text
    assert cells(text, "norm=sync") == [
        "norm=sync",
        "3 of 3",
        "100",
        "0.250",
        "0.250",
        "10.0×",
        "9.99 to 10.1",
        "faster",
    ]
    save_plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_is_a_row_per_variant_and_a_plot(tmp_path):
    comparison, jobs = make_comparison(), ended_jobs()
    steps = {job.id: 100 if job.variant["norm"] == "sync" else 1000 for job in jobs}
    curves = {job: [(0, 0.1), (step - 1, 0.5), (step, 0.85)] for job, step in steps.items()}
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
        "9.99 to 10.1",
        "faster",
    ]
    save_plot(report, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_warnings_are_shown_below_a_report():
    jobs = [
        make_job(
            spec=job.spec.model_copy(update={"gradient_accumulation_steps": 2}),
            variant=job.variant,
            state=job.state,
        )
        for job in ended_jobs()
    ]
    report = Report.of(
        make_report(
            make_comparison(), jobs, [job.spec for job in jobs], {job.id: [(0, 0.9)] for job in jobs}
        ),
        with_curves=False,
    )
    words = " ".join(render(report_table(report)).split())
    assert (
        "Warning: gradient_accumulation_steps: under norm 'sync' statistics are computed over each part"
        in words
    )


@pytest.mark.parametrize(("seeds", "is_warned"), [(1, True), (2, True), (3, False)])
def test_a_report_of_fewer_than_three_seeds_warns_of_too_few_seeds(seeds, is_warned):
    jobs = [job for job in ended_jobs() if job.variant["seed"] < seeds]
    curves = {job.id: [(100 if job.variant["norm"] == "sync" else 1000, 0.85)] for job in jobs}
    report = Report.of(
        make_report(make_comparison(), jobs, [job.spec for job in jobs], curves), with_curves=False
    )
    warning = f"seed: a verdict needs at least 3 seeds per variant (got {seeds})"
    assert (warning in report.warnings) == is_warned
    verdict = {1: "cannot tell", 2: "cannot tell", 3: "faster"}[seeds]
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
    recipe = make_recipe(FASTER)
    never, soon = [(0, 0.1), (1000, 0.7)], [(0, 0.1), (90, 0.5), (100, 0.85)]
    runs = [
        Run(variant={"norm": norm}, seed=seed, curves={"accuracy": curve})
        for seed in (0, 1, 2)
        for norm, curve in (("none", never), ("sync", soon))
    ]
    text = render(verdict_table(recipe.name, VerdictView.of(recipe, judge(recipe, runs))))
    assert "the claim holds" in text
    row = next(line for line in text.splitlines() if "none / sync" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "steps to 80 %, none / sync", "≥ 1,000", "100", "≥ 10", "10 to inf", "at least 5", "holds",
    ]  # fmt: skip
    assert "–" in render(verdict_table(recipe.name, VerdictView.of(recipe, judge(recipe, runs[:1]))))


def test_sparklines_span_the_range_and_leave_gaps():
    assert sparkline([0.0, None, 0.5, 1.0], 0, 1) == "▁ ▅█"
    assert sparkline([2.0], 2, 2) == "▁"
    assert sparkline([-1.7e308, 0.0, 1.7e308], -1.7e308, 1.7e308) == "▁▅█"


def test_a_watched_comparison_without_data():
    jobs = ended_jobs()
    report = make_report(make_comparison(), jobs, [job.spec for job in jobs], {job.id: [] for job in jobs})
    text = render(watched(Report.of(report, with_curves=True)))
    assert "Cannot tell: the baseline has no data." in text

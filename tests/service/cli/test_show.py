import io

from rich.console import Console

from service.api.schemas import ComparisonView, JobView, Report
from service.cli.show import JobBars, jobs_table, report_table, save_plot
from service.domain.jobs import JobState
from service.domain.reports import make_report
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
    return jobs, [JobView.of(job, "http://mlflow") for job in jobs]


def test_what_others_wrote_is_shown_as_it_is():
    _, shown = views()
    text = render(jobs_table(shown))
    assert GLOO in text
    assert "a [bold] name" in text


def test_bars_say_why_a_job_waits_or_failed():
    jobs, _ = views()
    bars = JobBars()
    bars.show(ComparisonView.of(make_comparison(), jobs, "http://mlflow"))
    text = render(bars._progress.get_renderable())
    assert "needs 8 CPUs" in text
    assert GLOO in text


def test_a_report_is_a_row_per_variant_and_a_plot(tmp_path):
    comparison = make_comparison()
    jobs = [
        make_job(
            spec=make_job().spec.model_copy(update={"seed": seed}),
            variant={"norm": norm, "seed": seed},
            state=JobState.SUCCEEDED,
        )
        for norm in ("none", "sync")
        for seed in (0, 1)
    ]
    curves = {job.id: [(0, 0.1), (100 if job.variant["norm"] == "sync" else 1000, 0.85)] for job in jobs}
    report = Report.of(make_report(comparison, jobs, curves), with_curves=True)
    text = render(report_table(report))
    row = next(line for line in text.splitlines() if "norm=sync" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "norm=sync",
        "2 of 2",
        "100",
        "0.850",
        "0.850",
        "10.0×",
        "faster",
    ]
    save_plot(report, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_failed_runs_are_counted_in_the_report():
    comparison = make_comparison()
    jobs = [
        make_job(variant={"norm": "none", "seed": 0}, state=JobState.SUCCEEDED),
        make_job(variant={"norm": "sync", "seed": 0}, state=JobState.FAILED),
    ]
    report = Report.of(make_report(comparison, jobs, {job.id: [(0, 0.9)] for job in jobs}), with_curves=False)
    assert report.variants[1].failed == 1
    assert report.variants[1].verdict == "runs failed"
    assert "1 of 1, 1 failed" in render(report_table(report))

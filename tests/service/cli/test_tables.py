import io
import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.schemas import JobSummaryView, JobView
from service.cli.output import SafeConsole
from service.cli.progress import JobBars
from service.cli.tables import job_view, jobs_table
from service.domain.jobs import JobState
from tests.service.cli.rendering import render
from tests.service.examples import make_job

GLOO = (
    "worker 0: RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection "
    "closed by peer [batch]"
)


def views():
    jobs = [
        make_job(name="a [bold] name", state=JobState.FAILED, reason=GLOO),
        make_job(reason="needs 8 CPUs, but the whole cluster has 2 CPUs and 0 GPUs"),
    ]
    return [JobView.of(job, "http://mlflow") for job in jobs]


def test_text_of_users_is_shown_literally():
    shown = views()
    text = render(jobs_table(shown))
    assert GLOO in text
    assert "a [bold] name" in text


def test_progress_bars_show_why_a_job_waits_or_failed():
    shown = views()
    bars = JobBars()
    bars.show(shown)
    text = render(bars._progress.get_renderable())
    assert "needs 8 CPUs" in text
    assert GLOO in text


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=100)
def test_text_of_users_cannot_send_terminal_escapes(name, reason):
    job = make_job(name=name, reason=reason, state=JobState.FAILED)
    for content in (
        job_view(JobView.of(job, "http://x"), []),
        jobs_table([JobSummaryView.of(job, "http://x")]),
    ):
        file = io.StringIO()
        SafeConsole(file=file, width=200, highlight=False).print(content)
        assert not [
            letter for letter in file.getvalue() if unicodedata.category(letter) == "Cc" and letter != "\n"
        ]

import json
from uuid import uuid4

from tests.service.cli.commands import read


def test_waiting_for_a_comparison_prints_its_report(syncbn, api, comparison, later, tmp_path):
    tag = uuid4().hex

    def end(*states):
        for job, state in zip(api.wait_for_jobs(tag, len(states)), states, strict=True):
            api.mlflow.curves[f"run-of-{job.id}", "accuracy"] = [(0, 0.1), (5, 0.6), (9, 0.7)]
            api.move(job.id, "submitted", state)

    later(lambda: end("succeeded", "succeeded"))
    code, stdout, stderr = syncbn("compare", comparison, "--tag", tag)
    assert code == 0, stderr
    comparison_id = stdout.partition(":")[0]
    assert "steps to 0.5" in stdout
    assert "norm=sync" in stderr
    report = read(syncbn("report", comparison_id, "--json", "--plot", tmp_path / "curves.png"))
    assert (report["finished"], [each["label"] for each in report["variants"]]) == (
        True,
        ["norm=none", "norm=sync"],
    )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    tag = uuid4().hex
    later(lambda: end("succeeded", "failed"))
    code, stdout, _ = syncbn("compare", comparison, "--tag", tag, "--json")
    found = json.loads(stdout)
    assert code == 3
    assert {job["state"] for job in found["comparison"]["jobs"]} == {"succeeded", "failed"}
    assert (found["report"]["finished"], found["verdict"]) == (True, None)


def test_comparisons_are_listed_newest_first(syncbn, api, comparison):
    ids = [syncbn("compare", comparison, "--no-wait")[1].partition(":")[0] for _ in range(2)]
    found = read(syncbn("comparisons", "--limit", "2", "--json"))
    assert [each["id"] for each in found] == ids[::-1]
    code, stdout, stderr = syncbn("comparisons", "--limit", "1")
    assert code == 0
    assert ids[1] in stdout
    assert "2 norm" in stdout
    assert "--limit shows them" in stderr


def test_a_report_is_written_into_a_file_by_its_suffix(syncbn, api, comparison, tmp_path):
    comparison_id = syncbn("compare", comparison, "--no-wait")[1].partition(":")[0]
    for suffix, begin in (
        ("html", "\n<!doctype html>"),
        ("md", "# "),
        ("csv", "variant,seed"),
        ("json", "{"),
    ):
        code, stdout, stderr = syncbn("report", comparison_id, "-o", tmp_path / f"report.{suffix}")
        assert (code, stdout) == (0, ""), stderr
        assert (tmp_path / f"report.{suffix}").read_text().lstrip("\n").startswith(begin.lstrip("\n"))
    code, _, stderr = syncbn("report", comparison_id, "-o", tmp_path / "report.pdf")
    assert code == 2
    assert "must end in .html, .md, .csv, .json (got 'report.pdf')" in " ".join(
        stderr.replace("│", "").split()
    )


def test_a_comparison_is_watched_until_its_jobs_have_ended(syncbn, api, comparison, later):
    tag = uuid4().hex
    comparison_id = syncbn("compare", comparison, "--no-wait", "--tag", tag)[1].partition(":")[0]

    def end():
        for job in api.wait_for_jobs(tag, 2):
            api.mlflow.curves[f"run-of-{job.id}", "accuracy"] = [(0, 0.1), (5, 0.6), (9, 0.7)]
            api.set_run(job.id)
            api.move(job.id, "submitted", "succeeded")

    later(end)
    code, stdout, stderr = syncbn("watch", comparison_id, "--seconds", "0.5")
    assert code == 0, stderr
    assert "Cannot tell" in stdout
    assert "▁" in stdout
    assert "█ " in stdout

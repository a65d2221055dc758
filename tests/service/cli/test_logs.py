import json

from tests.service.cli.commands import read
from trainer.jobspec import worker_log_file


def test_control_characters_are_escaped_except_in_raw_logs(syncbn, api):
    """Output of a job, and the reason of its end, must not control a terminal."""
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "a\tb\x1b[31mred\x07\u202e\x9b1m é\n")
    api.move(job_id, "failed", reason="worker 0: SystemExit: weird\x1b[31m\x9b")
    escaped = "a\tb\\x1b[31mred\\x07\\u202e\\x9b1m é\n"
    assert syncbn("logs", job_id)[1] == syncbn("logs", "-f", job_id)[1] == escaped
    raw = "a\tb\x1b[31mred\x07\u202e\x9b1m é\n"
    assert syncbn("logs", job_id, "--raw")[1] == syncbn("logs", "-f", job_id, "--raw")[1] == raw
    for command in (
        ("show", job_id),
        ("jobs",),
        ("show", job_id, "--json"),
        ("logs", "-f", job_id, "--json"),
    ):
        code, stdout, stderr = syncbn(*command)
        assert code == 0
        assert not {"\x1b", "\x9b", "\x07"} & set(stdout + stderr)
    assert "weird\\x1b[31m\\x9b" in syncbn("show", job_id)[1]


def test_logs_are_printed_and_followed(syncbn, api, later):
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "worker 1 of 2 on a, process 7\nERROR: no\n", worker_log_file(1))
    api.write(job_id, "driver [bold]\n")
    assert syncbn("logs", job_id)[1] == "[1] worker 1 of 2 on a, process 7\n[1] ERROR: no\ndriver [bold]\n"
    assert syncbn("logs", job_id, "--rank", 1, "--level", "warning")[1] == "[1] ERROR: no\n"
    assert read(syncbn("logs", job_id, "--level", "error", "--json")) == {"lines": ["[1] ERROR: no"]}
    later(lambda: api.write(job_id, "more\n"), lambda: api.move(job_id, "failed"))
    code, stdout, stderr = syncbn("logs", "-f", job_id)
    assert (code, stderr) == (0, f"{job_id}: failed\n")
    assert stdout == "[1] worker 1 of 2 on a, process 7\n[1] ERROR: no\ndriver [bold]\nmore\n"
    code, stdout, _ = syncbn("logs", "-f", job_id, "--rank", 1, "--level", "error", "--attempt", 1, "--json")
    assert [json.loads(line) for line in stdout.splitlines()] == [
        {"rank": 1, "level": "error", "text": "ERROR: no"},
        {"state": "failed"},
    ]
    assert syncbn("logs", job_id, "--attempt", 2)[0] == 1
    assert syncbn("logs", job_id, "--level", "loud")[0] == 2

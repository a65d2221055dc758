from tests.service.cli.commands import read


def test_the_cluster_is_shown_with_and_without_ray(syncbn, api):
    api.submit()
    code, printed, _ = syncbn("cluster")
    assert code == 0
    assert "Ray does not answer" in printed
    assert "queued" in printed
    shown = read(syncbn("cluster", "--json"))
    assert (shown["total"], shown["readiness"]["database"]["ok"], shown["readiness"]["ray"]["ok"]) == (
        None,
        True,
        False,
    )


def test_usage_is_shown(syncbn, api):
    job_id = api.submit()
    api.move(job_id, "submitted", "running", "failed")
    used = read(syncbn("usage", "--json"))["usage"]
    assert [each["owner"] for each in used] == ["admin"]
    assert used[0]["cpu_hours"] > 0
    code, printed, _ = syncbn("usage")
    assert code == 0
    assert "CPU-hours" in printed
    assert read(syncbn("usage", "--until", "2020-01-01", "--json"))["usage"] == []

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

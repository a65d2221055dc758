from tests.service.client.bad_network import DROP, Answer


def test_a_rejected_request_exits_with_1(syncbn, spec):
    code, printed, error = syncbn("submit", spec, "--set", "optimizer.lr=-1")
    assert (code, printed) == (1, "")
    assert "spec.optimizer.lr: Input should be greater than 0" in error
    for name in ("show", "cancel", "resume", "clone", "logs"):
        code, _, error = syncbn(name, "job-0")
        assert (code, error) == (1, "error: there is no job 'job-0'\n")
    assert syncbn("report", "comparison-0")[0] == 1


def test_an_unreachable_service_exits_with_4_after_reporting_attempts(syncbn, network, monkeypatch):
    monkeypatch.setenv("SYNCBN_URL", network.url)
    monkeypatch.setattr("service.client.retry.DEFAULT_RETRY_POLICY.__class__.max_attempts", 3)
    network.faults.extend([Answer(503, {"Retry-After": "3600"})])
    code, printed, error = syncbn("jobs")
    assert (code, printed) == (4, "")
    assert "answered 503" in error
    network.faults.extend([DROP])
    code, _, error = syncbn("jobs")
    assert code == 0
    assert "does not answer" in error
    assert "trying again in" in error

import json


def test_the_link_signs_in_and_opens_the_pages(syncbn, api):
    code, printed, errors = syncbn("open")
    assert code == 0, errors
    assert printed.startswith("http")
    assert "/sign-in#code=" in printed
    job = api.submit()
    home = "/mlflow/%23/experiments%3FworkflowType%3Dmachine_learning"
    for arguments, page in (([], "/"), ([job], f"/jobs/{job}"), (["--mlflow"], home)):
        code, printed, _ = syncbn("open", *arguments, "--json")
        assert json.loads(printed)["url"].endswith(f"&next={page}")
    code, _, errors = syncbn("open", job, "--mlflow")
    assert code == 2
    assert f"{job} has no run in MLflow yet" in errors


def test_an_unknown_job_is_an_error(syncbn):
    code, _, errors = syncbn("open", "job-0")
    assert code == 1
    assert "job-0" in errors

"""Checkpoints and artifacts on an S3-compatible store: moto's server in this process."""

import pytest
from moto.server import ThreadedMotoServer

from tests.trainer.factories import InterruptedRunError, Interrupting, make_spec, run_here


@pytest.fixture(scope="module")
def bucket():
    """Address of a bucket; the variables are those of docker-compose.yml."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "syncbn")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import boto3

        boto3.client("s3").create_bucket(Bucket="syncbn")
        yield "s3://syncbn"
    server.stop()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # connections of s3fs, closed with the process
def test_a_run_resumes_exactly_from_checkpoints_in_the_store(bucket):
    spec = make_spec(checkpoint={"every": 3})
    whole, _ = run_here(spec)
    with pytest.raises(InterruptedRunError):
        run_here(spec, f"{bucket}/checkpoints", metrics_logger=Interrupting(14))
    resumed, notes = run_here(spec, f"{bucket}/checkpoints")
    assert notes.resumed_from == 12
    for name, value in whole.model.state_dict().items():
        assert value.numpy().tobytes() == resumed.model.state_dict()[name].numpy().tobytes(), name


def test_mlflow_writes_and_reads_artifacts_in_the_store(bucket, tmp_path):
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    (tmp_path / "report.json").write_text("{}")
    store = get_artifact_repository(f"{bucket}/mlflow")
    store.log_artifact(str(tmp_path / "report.json"), "reports")
    assert [file.path for file in store.list_artifacts("reports")] == ["reports/report.json"]
    (tmp_path / "copy").mkdir()
    store.download_artifacts("reports", str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "reports" / "report.json").read_text() == "{}"

"""API whose jobs are in all states, with progress, logs and curves."""

from service.domain.submission import SubmitOptions
from tests.service.running_api import RunningApi

SPEC = {
    "model": {"name": "mlp", "hidden": [8]},
    "data": {"name": "digits"},
    "steps": 10,
    "num_workers": 2,
    "eval_every": 2,
}
COMPARISON = {
    "name": "does BN help",
    "spec": SPEC,
    "matrix": {"norm": ["none", "sync"], "seed": [0, 1, 2]},
    "target": 0.8,
}
ACCURACY = [0.1, 0.5, 0.7, 0.85, 0.9, 0.92]
LOSS = [2.3, 1.4, 0.9, 0.6, 0.5, 0.45]


class PopulatedApi(RunningApi):
    """API in a thread, whose fake cluster runs nothing: tests move the jobs."""

    def submit_named(self, name, *tags, **changes):
        with self.client() as client:
            return client.submit_job(name, SPEC | changes, SubmitOptions(tags=list(tags))).id

    def begin(self, job_id, step=4):
        """Start a job, which then has a run with the first values of its curves."""
        self.move(job_id, "submitted")
        self.set_run(job_id)
        self.move(job_id, "running", reason="attempt 1 is running")
        self.progress(job_id, step)
        self.measure(job_id, step)

    def measure(self, job_id, step):
        """Set the curves of a job up to a step."""
        for metric, values in {"accuracy": ACCURACY, "test_loss": LOSS}.items():
            points = [(2 * index, value) for index, value in enumerate(values)]
            self.mlflow.curves[f"run-of-{job_id}", metric] = [point for point in points if point[0] <= step]

    def finish(self, job_id, state="succeeded", reason="trained 10 steps"):
        """Bring a started job to its end."""
        self.progress(job_id, 10)
        self.measure(job_id, 10)
        self.move(job_id, state, reason=reason)

    def populate(self):
        """Submit jobs, and return their ids by state, and that of a comparison."""
        ids = {}
        for state in ("succeeded", "failed", "cancelled", "running", "queued"):
            ids[state] = self.submit_named(f"digits {state}", "nightly", f"wanted:{state}")
            if state != "queued":
                self.begin(ids[state])
            if state in ("succeeded", "failed", "cancelled"):
                self.finish(ids[state], state)
        with self.client() as client:
            comparison = client.submit_comparison(COMPARISON)
        for job in comparison.jobs[:4]:
            self.begin(job.id)
            self.finish(job.id)
        return ids | {"comparison": comparison.id}

"""The chart's containers run on a read-only root, and a job waits for a node that is added later."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PREPARE = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o size=4g tmpfs /tmp
mount -o remount,ro,bind /
for folder in "$@"; do
  point=$(stat --format %m "$folder")
  [ "$point" = / ] || mount -o remount,ro,bind "$point"
done
ip link set lo up
exec "$1" -m tests.deploy.pods
"""


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"),
    reason="namespaces need root, unshare and ip",
)
@pytest.mark.skipif(ROOT.is_relative_to("/tmp"), reason="an empty /tmp is mounted over this checkout")
def test_a_job_runs_on_the_chart_without_writing_to_the_root():
    ended = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "sh", "-c", PREPARE, "sh",
         sys.executable, str(ROOT)],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "succeeded, attempt 1" in ended.stdout

"""Start and stop `docker-compose.yml`: `make up-cluster`, `make down-cluster`.

Uses `docker compose`, or `podman-compose` where there is no Docker. Secrets that are missing are created in
`deploy/.env`, readable for its owner only. Only the standard library is imported, so that nothing needs to be
installed first.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENV_FILE = ROOT / "deploy" / ".env"
SECRETS = (
    "SYNCBN_TOKEN",
    "SYNCBN_METRICS_TOKEN",
    "SYNCBN_MLFLOW_SECRET",
    "RAY_AUTH_TOKEN",
    "POSTGRES_PASSWORD",
    "MLFLOW_PASSWORD",
    "S3_ARTIFACTS_KEY",
    "S3_CHECKPOINTS_KEY",
)
PROFILES = ("monitoring", "s3")
READY_SECONDS = 600
BUILD_SECONDS = 3_600


def compose_command() -> list[str]:
    """Return the command of the installed compose. Exits if there is none."""
    if shutil.which("docker") and _succeeds("docker", "info") and _succeeds("docker", "compose", "version"):
        return ["docker", "compose"]
    if shutil.which("podman-compose"):
        # Builds download packages; the network of the host is the one that is known to reach them.
        return ["podman-compose", "--podman-build-args=--network host"]
    sys.exit("missing: a running Docker with its compose plugin, or podman with podman-compose")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def read_env(path: Path) -> dict[str, str]:
    """Return the variables of an env file that have values; empty if it does not exist."""
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {name.strip(): text.strip("\"' ") for name, text in pairs if text.strip("\"' ")}


def keep_secrets(path: Path) -> dict[str, str]:
    """Return the variables of the env file, after adding the secrets that it lacks."""
    known = read_env(path)
    missing = {name: secrets.token_hex(32) for name in SECRETS if name not in known}
    if missing:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)
            file.writelines(f"\n{name}={value}\n" for name, value in missing.items())
    return known | missing


def git_commit() -> str:
    """Return the commit of the checkout, or `unknown`."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return found.stdout.strip() if found and found.returncode == 0 else "unknown"


def failed_check(url: str) -> str:
    """Return an empty string if the service is ready, or what is not."""
    # Without the proxies of the environment: the address is this machine's.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{url}/readyz", timeout=15).close()
    except urllib.error.HTTPError as error:
        with error:
            return _failed_names(error.read()) or f"/readyz answers {error.code}"
    except OSError as error:
        return f"the API does not answer: {error}"
    return ""


def _failed_names(answer: bytes) -> str:
    try:
        checks = json.loads(answer)
        failed = [name for name, check in checks.items() if isinstance(check, dict) and not check["ok"]]
        return ", ".join(f"{name}: {checks[name]['detail']}" for name in failed)
    except (ValueError, KeyError, AttributeError):
        return ""


def wait_until_ready(url: str, seconds: float) -> None:
    """Wait until `/readyz` answers 200, and print what is waited for. Exits after `seconds`."""
    deadline, last = time.monotonic() + seconds, ""
    while reason := failed_check(url):
        if reason != last:
            print(f"waiting: {reason}", flush=True)
            last = reason
        if time.monotonic() > deadline:
            sys.exit(f"not ready after {seconds:.0f} s: {reason}")
        time.sleep(2)


def main() -> None:
    """Run the action of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument(
        "--workers", type=int, help="number of Ray worker containers (default: RAY_WORKERS, or 2)"
    )
    parser.add_argument(
        "--file", action="append", default=[], help="an override file, such as deploy/compose.gpu.yml"
    )
    parser.add_argument("--profile", action="append", default=[], choices=PROFILES)
    parser.add_argument("--env-file", type=Path, default=ENV_FILE, help="file with the secrets")
    parser.add_argument("--volumes", action="store_true", help="`down` also deletes all data")
    options = parser.parse_args()
    env_file = options.env_file.absolute()
    variables = keep_secrets(env_file)
    # Compose prefers the variables of the shell, which may hold the token of another service.
    environment = os.environ | {name: variables[name] for name in SECRETS} | {"GIT_COMMIT": git_commit()}
    port = (variables | environment).get("SYNCBN_PUBLISHED_PORT", "8000")
    environment.setdefault(
        "SYNCBN_PUBLIC_URL", variables.get("SYNCBN_PUBLIC_URL", f"http://localhost:{port}")
    )
    files = [argument for file in ("docker-compose.yml", *options.file) for argument in ("--file", file)]
    # Services of profiles that are not named would stay, and keep their networks.
    chosen = options.profile if options.action == "up" else PROFILES
    profiles = [argument for profile in chosen for argument in ("--profile", profile)]
    command = [*compose_command(), "--env-file", str(env_file), *files, *profiles]
    if options.workers is not None:
        environment["RAY_WORKERS"] = str(options.workers)
    actions = {
        "up": ["up", "--detach", "--build"],
        "down": ["down", *(["--volumes"] if options.volumes else [])],
    }
    try:
        ended = subprocess.run(
            [*command, *actions[options.action]], cwd=ROOT, env=environment, timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"{command[0]} did not end within {BUILD_SECONDS} s")
    if ended.returncode != 0 or options.action == "down":
        sys.exit(ended.returncode)
    url = f"http://127.0.0.1:{port}"
    wait_until_ready(url, READY_SECONDS)
    print(f"ready: {url}")
    print(f"sign in with SYNCBN_TOKEN of {env_file}, and for the command line:")
    print(f"  export SYNCBN_URL={url} $(grep ^SYNCBN_TOKEN= {env_file})")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

"""Examples of requests."""

from typing import Any

Named = dict[str, dict[str, Any]]
SPEC: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [100, 100, 100], "activation": "sigmoid", "init_std": 0.05},
    "data": {"name": "mnist5k"},
    "norm": "sync",
    "num_workers": 2,
    "global_batch_size": 60,
    "steps": 2000,
    "eval_every": 50,
    "optimizer": {"name": "sgd", "lr": 0.1},
    "seed": 0,
    "precision": "fp32",
}
JOBS: Named = {
    "the paper's network on two workers": {"name": "first try", "spec": SPEC},
    "as little as can be said": {"name": "all defaults", "spec": {"steps": 500}},
    "two to four workers, with limits and retries": {
        "name": "digits, elastic",
        "priority": 10,
        "tags": ["team:vision", "nightly"],
        "retries": {"infrastructure": 2, "preempted": 20, "hang": 1},
        "queue_seconds": 86400,
        "run_seconds": 7200,
        "spec": {
            "model": {"name": "cnn", "channels": [16, 32]},
            "data": {"name": "digits"},
            "num_workers": [2, 4],
            "global_batch_size": 64,
            "steps": 5000,
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            "schedule": {"name": "cosine"},
            "early_stop": {"metric": "accuracy", "patience": 10},
            "checkpoint": {"every": 500, "keep_last": 3},
        },
    },
}
COMPARISONS: Named = {
    "with and without synchronised statistics": {
        "name": "does BN help",
        "spec": SPEC,
        "matrix": {"norm": ["none", "sync"], "optimizer.lr": [0.1, 0.5], "seed": [0, 1]},
        "baseline": {"norm": "none", "optimizer.lr": 0.1},
        "target": 0.8,
    },
    "variants that change several fields": {
        "name": "faster with BN",
        "spec": SPEC,
        "variants": {"plain": {"norm": "none"}, "bn-x5": {"norm": "sync", "optimizer.lr": 0.5}},
        "matrix": {"seed": [0, 1, 2]},
        "baseline": {"variant": "plain"},
    },
}
CHANGES: Named = {
    "on other terms of training": {"name": "second try", "overrides": {"steps": 4000, "checkpoint.keep_last": 3}},
}
REQUESTS: dict[str, Named] = {
    "submit_job": JOBS,
    "validate_job": JOBS,
    "submit_comparison": COMPARISONS,
    "validate_comparison": COMPARISONS,
    "clone_job": CHANGES | {"the same once more": {}},
    "resume_job": CHANGES,
    "make_webhook": {
        "of two ends and a threshold, for the jobs with a tag": {
            "url": "https://example.org/hooks/training",
            "states": ["succeeded", "failed"],
            "thresholds": [{"metric": "accuracy", "relation": "at_least", "bound": 0.9}],
            "tag": "nightly",
        },
        "of all ends": {"url": "https://example.org/hooks/training"},
    },
    "make_sign_in_link": {"to a run in MLflow": {"next": "/mlflow/#/experiments/1/runs/0d3f5c1b9a7e4f62"}},
    "make_token": {
        "to submit, for 90 days": {
            "owner": "ann",
            "scopes": ["submit"],
            "name": "laptop",
            "expires_in_seconds": 7_776_000,
        },
        "to look at an owner's jobs": {"owner": "ann", "scopes": ["read"], "name": "dashboard"},
    },
}
"""By operation and name."""

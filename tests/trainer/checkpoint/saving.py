"""Specs of runs with checkpoints."""

SPEC = {"steps": 8, "eval_every": 2, "checkpoint": {"every": 2, "keep_last": 3}}

import re

import pytest

from trainer.jobspec import JobSpec, spec_warnings


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, []),
        ({"lr_schedule": {"name": "constant", "warmup_steps": 99}}, []),
        (
            {"lr_schedule": {"name": "constant", "warmup_steps": 100}},
            [r"lr_schedule.warmup_steps: .* within 100 steps \(got 100\)"],
        ),
        ({"lr_schedule": {"name": "step", "steps": [50, 99]}}, []),
        (
            {"lr_schedule": {"name": "step", "steps": [50, 99], "warmup_steps": 1}},
            [r"lr_schedule.steps: 99 are after"],
        ),
        (
            {"lr_schedule": {"name": "step", "steps": [50, 100, 200]}},
            [r"lr_schedule.steps: 100, 200 are after the last of 100 steps"],
        ),
        ({"num_workers": 1, "parallel": "fsdp"}, ["parallel: has no effect on one worker"]),
        ({"num_workers": [1, 2], "parallel": "fsdp"}, []),
        (
            {"gradient_accumulation_steps": 2},
            [
                r"gradient_accumulation_steps: under norm 'sync' statistics are computed over each part of "
                r"30 samples.*\(got 2\)"
            ],
        ),
        (
            {"gradient_accumulation_steps": 2, "norm": "batch"},
            ["gradient_accumulation_steps: under norm 'batch'"],
        ),
        ({"gradient_accumulation_steps": 2, "norm": "group"}, []),
        (
            {"evaluation": {"statistics": "batch"}},
            ["evaluation.statistics: the exported model uses moving averages"],
        ),
        (
            {"early_stop": {"metric": "test_loss", "mode": "max"}},
            ["early_stop.mode: the smallest test_loss is the best"],
        ),
        ({"early_stop": {"metric": "test_loss", "mode": "min"}}, []),
        (
            {"checkpoint": {"keep_best": "accuracy", "best_mode": "min"}},
            ["checkpoint.best_mode: the largest accuracy"],
        ),
        ({"on_extend": "restart"}, ["on_extend: has no effect on a constant schedule"]),
        ({"on_extend": "restart", "lr_schedule": {"name": "cosine"}}, []),
    ],
)
def test_fields_without_effect_cause_warnings(changes, warnings):
    found = spec_warnings(JobSpec.model_validate({"steps": 100} | changes))
    assert len(found) == len(warnings)
    for text, pattern in zip(found, warnings, strict=True):
        assert re.match(pattern, text), text


SMALL = {"num_workers": 4, "global_batch_size": 8, "norm": "batch"}
CNN = {"name": "cnn", "channels": [4, 4, 4, 4]}
DIGITS = {"name": "digits"}


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (SMALL, "of 2 samples; 2 values per channel cost .* over all workers, by 'sync', they are of 8 "),
        (SMALL | {"global_batch_size": 31}, "of 7 samples; 7 values per channel cost"),
        (SMALL | {"global_batch_size": 32}, None),
        (SMALL | {"global_batch_size": 64, "gradient_accumulation_steps": 4}, "of 4 samples"),
        (SMALL | {"num_workers": [1, 4]}, "of 2 samples"),
        (SMALL | {"num_workers": 1, "global_batch_size": 4}, "a larger global_batch_size, or norm 'group'"),
        (SMALL | {"norm": "sync"}, None),
        (SMALL | {"norm": "sync", "sync_group_size": 2}, r"of 4 samples; .* they are of 8 \(got 'sync'\)"),
        (SMALL | {"norm": "group"}, None),
        # Three halvings of 8x8 images leave one position, of 28x28 images nine.
        (SMALL | {"model": CNN, "data": DIGITS}, "2 values per channel cost"),
        (SMALL | {"model": CNN}, "may cost accuracy, also with many positions"),
        (SMALL | {"model": {"name": "torchvision:resnet18"}}, "may cost accuracy, also with many positions"),
    ],
)
def test_statistics_over_few_values_cause_a_warning(changes, warning):
    found = [
        text for text in spec_warnings(JobSpec.model_validate({"steps": 100} | changes)) if "samples;" in text
    ]
    assert len(found) == (warning is not None)
    for text in found:
        assert re.match(f"norm: statistics are .*{warning}", text), text

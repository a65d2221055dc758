from service.domain.jobs import JobState
from service.domain.reports import parameter_differences, request_of, setup_of
from tests.service.domain.comparison_runs import FAST, SLOW, make_run, make_runs, report_of
from trainer.jobspec import JobSpec


def test_variants_are_in_the_order_of_the_matrix_and_against_the_baseline():
    made = report_of(make_runs("none", SLOW), make_runs("sync", FAST))
    assert [variant.label for variant in made.variants] == ["norm=none", "norm=sync"]
    assert [variant.verdict for variant in made.variants] == ["baseline", "faster"]
    assert made.finished
    assert len(made.variants[1].runs) == 3
    assert made.warnings == []


def test_the_target_is_what_all_runs_of_the_baseline_reach_unless_given():
    assert report_of(make_runs("none", SLOW), target=None).setting.target == 0.85
    assert report_of(make_runs("none", SLOW)).setting.target == 0.8


def test_two_seeds_cause_a_warning_and_unfinished_jobs_are_counted():
    two = {seed: SLOW[seed] for seed in (0, 1)}
    made = report_of(make_runs("none", two), make_runs("sync", two, state=JobState.RUNNING))
    assert not made.finished
    assert any(warning.startswith("seed:") for warning in made.warnings)


def test_differences_of_parameters_leave_out_the_seed():
    specs = {
        norm: JobSpec(steps=2_000, norm=norm, optimizer={"name": "sgd", "lr": rate})
        for norm, rate in (("none", 0.1), ("sync", 0.5))
    }
    runs = [[make_run({"norm": norm}, 0, [], spec=spec)] for norm, spec in specs.items()]
    assert parameter_differences(report_of(*runs)) == {"norm": ["none", "sync"], "optimizer.lr": [0.1, 0.5]}


def test_the_seed_of_a_spec_without_an_axis_for_it_is_reproduced():
    spec = JobSpec(steps=2_000, seed=7)
    report = report_of([make_run({"norm": "none"}, 7, [], spec=spec)])
    report.comparison.matrix.pop("seed")
    assert request_of(report)["spec"]["seed"] == 7
    report.comparison.matrix["seed"] = [7]
    assert "seed" not in request_of(report)["spec"]


def test_many_variants_cause_a_warning():
    def warnings(count):
        variants = [[make_run({"norm": "none", "x": number}, 0, SLOW[0])] for number in range(count + 1)]
        return [text for text in report_of(*variants).warnings if text.startswith("variants:")]

    assert warnings(4) == []
    assert warnings(15) == [
        "variants: 15 variants are compared with the baseline, each at 95%; without any difference, one of "
        "them would be called faster by chance in about 32% of comparisons"
    ]


def test_the_setup_in_words():
    text = setup_of(report_of(make_runs("none", SLOW)))
    assert (
        text == "mlp on mnist5k, 2,000 steps, 1 worker, 60 samples per step, sgd with a learning rate of 0.1"
    )

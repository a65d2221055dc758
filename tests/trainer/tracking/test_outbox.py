from tests.trainer.tracking.tracked import read, whole
from trainer.tracking.outbox import OUTBOX_FILE, Outbox, read_lines


def test_the_outbox_is_a_file_of_lines(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.log(0, {"accuracy": 0.1})
    outbox.log(10, {"accuracy": 0.5, "loss": 1.0})
    outbox.close()
    assert [(line["step"], line["metrics"]) for line in read(tmp_path)] == [
        (0, {"accuracy": 0.1}),
        (10, {"accuracy": 0.5, "loss": 1.0}),
    ]


def test_a_new_attempt_does_not_log_steps_again(tmp_path):
    first = Outbox(tmp_path)
    first.log(0, {"accuracy": 0.1})
    first.log(10, {"accuracy": 0.5})
    first.log(4, {"probe/loss_range": 1.0}, "probes")
    first.close()
    with (tmp_path / OUTBOX_FILE).open("a") as file:
        file.write('{"step": 20, "timest')  # killed while writing
    second = Outbox(tmp_path)
    for step in (0, 10, 20):
        second.log(step, {"accuracy": step / 100})
        second.log(step, {"probe/loss_range": 2.0}, "probes")
    assert second.next_step("system") == 0
    second.close()
    lines = [(line["kind"], line["step"], *line["metrics"].values()) for line in read_lines(whole(tmp_path))]
    assert [line[1:] for line in lines if line[0] == "evaluation"] == [(0, 0.1), (10, 0.5), (20, 0.2)]
    assert [line[1:] for line in lines if line[0] == "probes"] == [(4, 1.0), (10, 2.0), (20, 2.0)]

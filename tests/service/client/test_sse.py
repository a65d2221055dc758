import threading
import time

import pytest

from service.api.schemas import EventView
from service.client.retry import ApiError, RetryPolicy
from service.client.sse import Ended, LogLine
from tests.service.client.bad_network import DROP, LOSE, Answer, Cut
from tests.service.client.faulty_network import Waiting
from trainer.jobspec import Progress


def test_a_log_is_complete_over_a_bad_network(api, network, by):
    """Lines with every line end of Python that server-sent events do not have; disconnects, rejections, and
    cuts within lines.
    """
    job_id = api.submit()
    texts = [f"line {number} \x0b \x85 \u2028 …" for number in range(200)]
    api.move(job_id, "submitted")
    api.write(job_id, "".join(f"{text}\n" for text in texts))
    api.move(job_id, "failed")
    network.faults.extend([Cut(1000), Answer(503), Cut(3333), DROP, DROP, Cut(5000), LOSE, Cut(10)])
    seen = by.collect(network.url, lambda client: client.follow_logs(job_id))
    assert [event.text for event in seen[:-1]] == texts
    assert seen[-1] == Ended(state="failed")
    last_ids = [headers["Last-Event-ID"] for _, headers in network.seen]
    assert len(last_ids) == 9
    assert last_ids[0] is None
    assert last_ids[-1].startswith("1:")


def test_a_log_is_followed_over_a_restart_of_the_service(api, by):
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "before\n")

    def continue_job():
        time.sleep(0.5)
        api.stop()
        time.sleep(0.5)
        api.start()
        api.write(job_id, "ERROR after\n")
        api.move(job_id, "queued", "submitted")
        api.write(job_id, "again\n")
        api.move(job_id, "cancelled")

    thread = threading.Thread(target=continue_job)
    thread.start()
    try:
        seen = by.collect(api.url, lambda client: client.follow_logs(job_id), retry_policy=RetryPolicy())
    finally:
        thread.join()
    assert seen == [
        LogLine(rank=None, level="info", text="before"),
        LogLine(rank=None, level="error", text="ERROR after"),
        LogLine(rank=None, level="info", text="again"),
        Ended(state="cancelled"),
    ]
    assert by.collect(api.url, lambda client: client.follow_logs(job_id, level="error"))[:-1] == seen[1:2]
    assert by.collect(api.url, lambda client: client.follow_logs(job_id, attempt=2))[:-1] == seen[2:3]


def test_a_stream_ends_after_attempts_without_events(api, network, by):
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "one\ntwo\n")
    one = len('event: line\ndata: {"rank":null,"level":"info","text":"one"}\nid: 1:4\n\n')
    network.faults.extend([DROP, DROP, DROP, Cut(one), Cut(10), Cut(10), Cut(10), Cut(10)])
    seen = []

    def note(client):
        return (seen.append(event) or event for event in client.follow_logs(job_id))

    async def note_each(client):
        async for event in client.follow_logs(job_id):
            seen.append(event)
            yield event

    with pytest.raises(ApiError, match="ended before the job did") as failed:
        by.collect(network.url, note if isinstance(by, Waiting) else note_each)
    assert failed.value.is_transient
    assert [event.text for event in seen] == ["one"]
    assert len(network.seen) == 7  # attempts before the received line do not count


def test_a_timeline_is_followed_with_progress(api, network, by):
    job_id = api.submit()
    api.move(job_id, "submitted", "running")

    def continue_job():
        time.sleep(0.5)
        api.progress(job_id, 7)
        time.sleep(0.5)
        api.move(job_id, "succeeded")

    thread = threading.Thread(target=continue_job)
    thread.start()
    try:
        network.faults.append(Cut(300))
        seen = by.collect(network.url, lambda client: client.follow_events(job_id))
    finally:
        thread.join()
    states = [event.state for event in seen if isinstance(event, EventView)]
    assert states == ["queued", "submitted", "running", "succeeded"]
    assert Progress(step=7, total_steps=10, samples_per_second=9, eta_seconds=1) in seen
    assert seen[-1] == Ended(state="succeeded")

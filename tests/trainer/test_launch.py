"""Parts of the driver that need no Ray."""

import threading
import time

from trainer.launch import wait_while_saving


def test_a_driver_that_is_to_stop_waits_for_the_checkpoint_that_is_being_written(tmp_path):
    marker = tmp_path / "saving"
    began = time.monotonic()
    wait_while_saving(marker, 30)
    assert time.monotonic() - began < 1
    for finish in (marker.unlink, lambda: marker.write_text("the next one")):
        marker.write_text("this one")
        threading.Timer(0.3, finish).start()
        began = time.monotonic()
        wait_while_saving(marker, 30)
        assert 0.25 < time.monotonic() - began < 10
    began = time.monotonic()
    wait_while_saving(marker, 0.2)
    assert 0.2 <= time.monotonic() - began < 10

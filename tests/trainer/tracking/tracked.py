"""Reading of outbox files for tests."""

import json

from trainer.tracking.outbox import OUTBOX_FILE


def read(folder):
    return [json.loads(line) for line in (folder / OUTBOX_FILE).read_text().splitlines()]


def whole(folder):
    return (folder / OUTBOX_FILE).read_bytes()

"""Reading of command output for tests."""

import json


def read(answer):
    code, stdout, stderr = answer
    assert code == 0, stderr
    return json.loads(stdout)

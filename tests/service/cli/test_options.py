import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "steps"), "must be NAME=VALUE (got steps)"),
        (("--set", "steps=[1"), "steps takes JSON or YAML (got [1)"),
        (("--set", "steps=2001-99-99"), "steps takes JSON or YAML (got 2001-99-99)"),
        (("--set", "steps=!!int x"), "steps takes JSON or YAML (got !!int x)"),
        (("--set", "steps=" + "9" * 5_000), "steps takes JSON or YAML (got 9999"),
        (("--set", "steps=" + "[" * 3_000), "steps takes JSON or YAML (got [[["),
        (("--set", "steps=NaN"), "steps: must be a JSON value"),
        (("--set", "steps.x=1"), "steps.x: steps is 10, and has no fields"),
        (("--set", "a=1", "--set", "a=2"), "must name each name once (got a twice)"),
        (("--retries", "hang=often"), "hang must be a whole number (got often)"),
        (("--retries", "user=1"), "retries.user: Extra inputs"),
        (("--priority", "1000"), "priority: Input should be less than or equal to 100"),
        (("--tag", "a", "--tag", "a"), "must have each tag once"),
        (("--secret", "PATH=x"), "must not be PATH"),
        (("--queue-timeout-seconds", "0"), "queue_timeout_seconds: Input should be greater than 0"),
        (("--secret", "A=hf_ABC DEF"), "secrets.A: String should match pattern"),
    ],
)
def test_invalid_options_are_named_and_nothing_is_sent(syncbn, api, spec, options, message):
    with api.client() as client:
        before = sum(client.cluster().jobs.values())
        code, printed, error = syncbn("submit", spec, *options)
        assert (code, printed) == (2, "")
        assert message in " ".join(error.replace("│", " ").split())
        assert "hf_ABC" not in error
        assert sum(client.cluster().jobs.values()) == before

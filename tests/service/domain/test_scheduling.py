import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.scheduling import (
    Capacity,
    Cluster,
    Policy,
    Quota,
    SchedulableJob,
    least_needs,
    most_needs,
    plan,
)
from trainer.jobspec import JobSpec

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NUMBERS = itertools.count()


def job(least, most=None, *, waited=0.0, owner="ann", **changes):
    values = {
        "id": f"job-{next(NUMBERS):06d}",
        "owner": owner,
        "queued_at": NOW - timedelta(seconds=waited),
        "least": Capacity(cpus=least),
        "most": Capacity(cpus=most or least),
    }
    return SchedulableJob(**(values | changes))


def cluster(cpus, free=None, gpus=0):
    total = Capacity(cpus, gpus)
    return Cluster(total, total if free is None else Capacity(free, gpus))


def admit(waiting, active, has, **rules):
    """The admitted ones of a plan, whose reasons are complete."""
    policy = Policy(**({"most_active": 8} | rules))
    found = plan(waiting, active, has, policy, NOW)
    assert found.reasons.keys() | {one.id for one in found.admitted} == {one.id for one in waiting}
    assert not found.reasons.keys() & {one.id for one in found.admitted}
    return found.admitted


sizes = st.integers(1, 12)
owners = st.sampled_from(["ann", "bob", "cat"])
candidates = st.builds(
    lambda least, more, waited, owner, priority, placed: job(
        least, least + more, waited=waited, owner=owner, priority=priority, has_workers=placed
    ),
    sizes, st.integers(0, 4), st.floats(0, 100_000), owners, st.integers(-2, 2), st.booleans(),
)  # fmt: skip
quotas = st.builds(Quota, st.none() | st.integers(0, 4), st.none() | st.integers(0, 16))


@given(
    st.lists(candidates, max_size=12),
    st.lists(candidates, max_size=4),
    st.integers(0, 32),
    st.integers(0, 32),
    st.integers(1, 6),
    st.dictionaries(owners, quotas),
)
@settings(max_examples=500)
def test_never_more_than_there_is_nor_than_is_allowed(waiting, active, cpus, free, most_active, by_owner):
    has = cluster(cpus, min(free, cpus))
    admitted = admit(waiting, active, has, most_active=most_active, quotas=by_owner)
    if not admitted:
        return
    *before, last = admitted
    held = [*active, *before]
    # At the time when the last one was admitted, its whole gang fitted beside all that the others may come to hold ...
    assert last.least.cpus + sum(one.most.cpus for one in held) <= cpus
    # ... and into what Ray has free, less what it has promised.
    assert last.least.cpus + sum(one.most.cpus for one in held if not one.has_workers) <= has.free.cpus
    assert len(active) + len(admitted) <= most_active
    for owner, quota in by_owner.items():
        new = [one for one in admitted if one.owner == owner]
        if new:
            of_owner = [one for one in active if one.owner == owner]
            assert quota.jobs is None or len(of_owner) + len(new) <= quota.jobs
            assert quota.cpus is None or sum(one.most.cpus for one in [*of_owner, *new]) <= quota.cpus


@given(st.lists(candidates, max_size=12), st.integers(1, 32))
def test_an_idle_cluster_never_stays_so(waiting, cpus):
    possible = [one for one in waiting if one.least.cpus <= cpus]
    assert bool(admit(waiting, [], cluster(cpus))) == bool(possible)


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 30), st.integers(-5, 5), owners), min_size=20, max_size=60),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_nobody_starves(cpus, arrivals, has_quota):
    """A large job of the lowest priority starts in the end, however many others of higher ones keep coming and pass it.

    With a quota, the others are its owner's, and there is always room for all that this takes.
    """
    quotas = {"dan": Quota(cpus=cpus)} if has_quota else {}
    policy = Policy(most_active=4, backfill=timedelta(seconds=20), patience=timedelta(seconds=50), quotas=quotas)
    target = job(cpus, waited=0, priority=-100, owner="dan")
    waiting, running = [target], []
    longest = max(seconds for _, seconds, _, _ in arrivals)
    for second in range(50 + 2 * longest + 2):
        now = NOW + timedelta(seconds=second)
        for size, _, priority, owner in [arrivals[second % len(arrivals)]] * 2:
            owner = "dan" if has_quota else owner
            waiting.append(job(min(size, cpus), priority=priority, owner=owner, queued_at=now))
        running = [(one, end) for one, end in running if end > second]
        found = plan(waiting, [one for one, _ in running], cluster(2 * cpus if has_quota else cpus), policy, now)
        for one in found.admitted:
            waiting.remove(one)
            running.append((one, second + arrivals[second % len(arrivals)][1]))
        if target in found.admitted:
            return
    raise AssertionError("the large job never started")


def test_priority_then_share_then_age():
    late, early = job(1, waited=1), job(1, waited=2)
    urgent = job(1, priority=1)
    assert admit([late, early, urgent], [], cluster(1)) == [urgent]
    assert admit([late, early], [], cluster(1)) == [early]
    # The owner with the smaller share of the cluster goes first, though their job is younger.
    other = job(1, owner="bob")
    assert admit([early, other], [job(1, owner="ann", has_workers=True)], cluster(2)) == [other]


def test_shares_are_told_apart_between_two_admissions():
    mine, theirs = [job(1, waited=9) for _ in range(3)], [job(1, owner="bob") for _ in range(3)]
    assert [one.owner for one in admit([*mine, *theirs], [], cluster(4))] == ["ann", "bob", "ann", "bob"]


def test_who_waits_longer_than_patience_goes_before_any_priority():
    old = job(1, waited=7 * 3600, priority=-100)
    assert admit([job(1, priority=100), old], [], cluster(1)) == [old]


def test_smaller_jobs_pass_one_that_waits_for_room_but_not_for_ever():
    small, active = job(1, waited=1), [job(1, has_workers=True)]
    large = job(2, waited=2)
    assert admit([large, small], active, cluster(2, 1)) == [small]
    large = job(2, waited=301)
    assert admit([large, small], active, cluster(2, 1)) == []
    found = plan([large, small], active, cluster(2, 1), Policy(most_active=8), NOW)
    assert found.reasons[small.id] == f"waits behind {large.id}, which has waited longer for 2 CPUs"


def test_neither_a_job_too_large_nor_one_over_quota_holds_back_others():
    huge, mine, theirs = job(50, waited=9_999), job(2, waited=9_999), job(1, owner="bob")
    rules = {"quotas": {"ann": Quota(cpus=1)}}
    assert admit([huge, mine, theirs], [], cluster(2), **rules) == [theirs]
    found = plan([huge, mine], [], cluster(2), Policy(most_active=8, **rules), NOW)
    assert found.reasons == {
        huge.id: "needs 50 CPUs, but the whole cluster has 2 CPUs",
        mine.id: "may hold 2 CPUs, more than the quota of ann",
    }


def test_what_others_use_of_the_cluster_is_not_free():
    assert admit([job(2)], [], cluster(4, free=1)) == []
    # What was submitted, and has no workers yet, takes part of what Ray still calls free.
    assert admit([job(2)], [job(2)], cluster(4, free=3)) == []
    assert len(admit([job(2)], [job(2, has_workers=True)], cluster(4, free=2))) == 1


def test_a_retry_waits_for_its_time():
    later = job(1, not_before=NOW + timedelta(seconds=1))
    assert admit([later], [], cluster(1)) == []
    assert len(admit([job(1, not_before=NOW)], [], cluster(1))) == 1


def test_gpus_are_counted():
    spec = JobSpec(steps=1, num_workers=2, use_gpu=True)
    on_gpu = replace(job(2), least=least_needs(spec), most=most_needs(spec))
    assert admit([on_gpu], [], cluster(8, gpus=1)) == []
    assert admit([on_gpu], [], cluster(8, gpus=2)) == [on_gpu]


def test_an_elastic_job_starts_with_its_least_and_is_counted_with_its_most():
    spec = JobSpec(steps=1, num_workers=[2, 4])
    elastic = replace(job(2, has_workers=True), least=least_needs(spec), most=most_needs(spec))
    assert admit([elastic], [], cluster(2)) == [elastic]
    assert admit([job(1)], [elastic], cluster(4)) == []
    assert len(admit([job(1)], [elastic], cluster(5))) == 1

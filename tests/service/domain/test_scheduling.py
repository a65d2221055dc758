import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from unittest.mock import patch

from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.domain import scheduling
from service.domain.resources import Cluster, Node, Resources, max_resources, min_resources
from service.domain.scheduling import Policy, Quota, SchedulableJob, plan
from trainer.jobspec import JobSpec

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NUMBERS = itertools.count()


def job(least, most=None, *, waited=0.0, owner="ann", **changes):
    values = {
        "id": f"job-{next(NUMBERS):06d}",
        "owner": owner,
        "queued_at": NOW - timedelta(seconds=waited),
        "min_resources": Resources(cpus=least),
        "max_resources": Resources(cpus=most or least),
    }
    return SchedulableJob(**(values | changes))


def cluster(cpus, free=None, gpus=0):
    total = Resources(cpus, gpus)
    return Cluster(total, total if free is None else Resources(free, gpus))


def admit(waiting, active, has, **rules):
    """Return the admitted jobs of a plan, and check that all others have reasons."""
    policy = Policy(**({"max_active": 8} | rules))
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
@settings(max_examples=200)
def test_admission_exceeds_neither_resources_nor_quotas(waiting, active, cpus, free, max_active, by_owner):
    has = cluster(cpus, min(free, cpus))
    admitted = admit(waiting, active, has, max_active=max_active, quotas=by_owner)
    if not admitted:
        return
    *before, last = admitted
    held = [*active, *before]
    # At its admission the whole gang of the last job fitted next to the maximum of all others ...
    # hold ...
    assert last.min_resources.cpus + sum(one.max_resources.cpus for one in held) <= cpus
    # ... and into Ray's free resources less those already promised.
    assert (
        last.min_resources.cpus + sum(one.max_resources.cpus for one in held if not one.has_workers)
        <= has.free.cpus
    )
    assert len(active) + len(admitted) <= max_active
    for owner, quota in by_owner.items():
        new = [one for one in admitted if one.owner == owner]
        if new:
            of_owner = [one for one in active if one.owner == owner]
            assert quota.jobs is None or len(of_owner) + len(new) <= quota.jobs
            assert (
                quota.cpus is None or sum(one.max_resources.cpus for one in [*of_owner, *new]) <= quota.cpus
            )


@given(st.lists(candidates, max_size=12), st.integers(1, 32))
def test_an_idle_cluster_admits_a_job_that_fits(waiting, cpus):
    possible = [one for one in waiting if one.min_resources.cpus <= cpus]
    assert bool(admit(waiting, [], cluster(cpus))) == bool(possible)


@given(
    st.integers(1, 8),
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 30), st.integers(-5, 5), owners), min_size=20, max_size=60
    ),
    st.booleans(),
)
@settings(max_examples=80)
def test_large_low_priority_jobs_do_not_starve(cpus, arrivals, has_quota):
    """A large job of lowest priority starts eventually, although jobs of higher priority keep arriving and
    pass it.

    With a quota, the others belong to its owner, and there is always room for all of them.
    """
    quotas = {"dan": Quota(cpus=cpus)} if has_quota else {}
    policy = Policy(
        max_active=4, backfill=timedelta(seconds=20), starvation=timedelta(seconds=50), quotas=quotas
    )
    target = job(cpus, waited=0, priority=-100, owner="dan")
    waiting, running = [target], []
    longest = max(seconds for _, seconds, _, _ in arrivals)
    for second in range(50 + 2 * longest + 2):
        now = NOW + timedelta(seconds=second)
        for size, _, priority, owner in [arrivals[second % len(arrivals)]] * 2:
            owner = "dan" if has_quota else owner
            waiting.append(job(min(size, cpus), priority=priority, owner=owner, queued_at=now))
        running = [(one, end) for one, end in running if end > second]
        found = plan(
            waiting, [one for one, _ in running], cluster(2 * cpus if has_quota else cpus), policy, now
        )
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
    # The owner with the smaller share of the cluster comes first, although their job is younger.
    other = job(1, owner="bob")
    assert admit([early, other], [job(1, owner="ann", has_workers=True)], cluster(2)) == [other]


def test_shares_are_updated_between_two_admissions():
    mine, theirs = [job(1, waited=9) for _ in range(3)], [job(1, owner="bob") for _ in range(3)]
    assert [one.owner for one in admit([*mine, *theirs], [], cluster(4))] == ["ann", "bob", "ann", "bob"]


def test_starving_jobs_precede_every_priority():
    old = job(1, waited=7 * 3600, priority=-100)
    assert admit([job(1, priority=100), old], [], cluster(1)) == [old]


def test_smaller_jobs_pass_a_waiting_larger_one_for_a_limited_time():
    small, active = job(1, waited=1), [job(1, has_workers=True)]
    large = job(2, waited=2)
    assert admit([large, small], active, cluster(2, 1)) == [small]
    large = job(2, waited=301)
    assert admit([large, small], active, cluster(2, 1)) == []
    found = plan([large, small], active, cluster(2, 1), Policy(max_active=8), NOW)
    assert found.reasons[small.id] == f"waits behind {large.id}, which has waited longer for 2 CPUs"


def test_too_large_and_over_quota_jobs_do_not_block_others():
    huge, mine, theirs = job(50, waited=9_999), job(2, waited=9_999), job(1, owner="bob")
    rules = {"quotas": {"ann": Quota(cpus=1)}}
    assert admit([huge, mine, theirs], [], cluster(2), **rules) == [theirs]
    found = plan([huge, mine], [], cluster(2), Policy(max_active=8, **rules), NOW)
    assert found.reasons == {
        huge.id: "needs 50 CPUs, but the whole cluster has 2 CPUs",
        mine.id: "may hold 2 CPUs, more than the quota of ann",
    }


def test_resources_used_by_other_ray_jobs_are_not_free():
    assert admit([job(2)], [], cluster(4, free=1)) == []
    # A submission without workers yet occupies part of what Ray reports as free.
    assert admit([job(2)], [job(2)], cluster(4, free=3)) == []
    assert len(admit([job(2)], [job(2, has_workers=True)], cluster(4, free=2))) == 1


def test_a_retry_waits_for_its_time():
    later = job(1, not_before=NOW + timedelta(seconds=1))
    assert admit([later], [], cluster(1)) == []
    assert len(admit([job(1, not_before=NOW)], [], cluster(1))) == 1


def test_gpus_are_counted():
    spec = JobSpec(steps=1, num_workers=2, use_gpu=True)
    on_gpu = replace(job(2), min_resources=min_resources(spec), max_resources=max_resources(spec))
    assert admit([on_gpu], [], cluster(8, gpus=1)) == []
    assert admit([on_gpu], [], cluster(8, gpus=2)) == [on_gpu]


def test_an_elastic_job_starts_at_its_minimum_and_counts_at_its_maximum():
    spec = JobSpec(steps=1, num_workers=[2, 4])
    elastic = replace(
        job(2, has_workers=True), min_resources=min_resources(spec), max_resources=max_resources(spec)
    )
    assert admit([elastic], [], cluster(2)) == [elastic]
    assert admit([job(1)], [elastic], cluster(4)) == []
    assert len(admit([job(1)], [elastic], cluster(5))) == 1


def test_jobs_are_admitted_into_the_nodes_that_an_autoscaler_would_add():
    first, second, third = job(4, waited=3), job(4, waited=2), job(2, waited=1)
    empty = cluster(0)
    assert admit([first], [], empty) == []
    admitted = admit([first, second, third], [], empty, autoscaled=Resources(cpus=6))
    assert admitted == [first, third]
    # A node with 4 CPUs is there, and holds the first job; the second still has to wait for it.
    placed = replace(first, has_workers=True)
    assert admit([second, third], [placed], cluster(4, free=0), autoscaled=Resources(cpus=6)) == [third]
    # An autoscaler with a lower limit than the nodes that are there takes nothing away.
    assert admit([first], [], cluster(4), autoscaled=Resources(cpus=2)) == [first]


def test_jobs_are_sorted_once_however_many_are_admitted():
    """Sorting again after each admission took 25 s for 800 admissions from a queue of 10,000 jobs."""
    waiting = [job(1, owner=f"owner-{number % 20}", waited=1) for number in range(400)]
    with patch.object(scheduling, "_age", side_effect=scheduling._age) as compared:
        assert len(admit(waiting, [], cluster(400), max_active=400)) == 400
    # Once for each job, and for the first ones of the owners that have the same share.
    assert compared.call_count <= 400 + 400 * 20


def preempt(waiting, active, has, **rules):
    found = plan(waiting, active, has, Policy(**({"max_active": 8} | rules)), NOW)
    return found.preempted, [one.id for one in found.admitted]


preemptible = st.builds(
    lambda one, may, stopping, by: replace(
        one, preemptible=may, is_stopping=stopping, preempted_by="job-x" if by else None
    ),
    candidates,
    st.booleans(),
    st.sampled_from([False, False, False, True]),
    st.sampled_from([False, False, True]),
)  # fmt: skip


def low(cpus, most=None, **changes):
    return job(cpus, most, **({"has_workers": True, "preemptible": True, "priority": -1} | changes))


@given(
    st.lists(preemptible, max_size=6),
    st.lists(preemptible, max_size=6),
    st.integers(1, 32),
    st.integers(0, 32),
    st.integers(1, 6),
    st.dictionaries(owners, quotas),
)
@example([job(4)], [low(2, 8)], 8, 8, 2, {})
@settings(max_examples=300)
def test_preemption_frees_what_one_job_needs_and_no_more(waiting, active, cpus, used, max_active, by_owner):
    policy = Policy(max_active=max_active, quotas=by_owner)
    has = cluster(cpus, max(cpus - used, 0))
    found = plan(waiting, active, has, policy, NOW)

    def fits(preemptor, kept):
        freed = sum(one.max_resources.cpus for one in active if one not in kept and one.has_workers)
        then = cluster(cpus, has.free.cpus + freed)
        kept = [*kept, *found.admitted]
        return plan([preemptor], kept, then, policy, NOW).admitted == [preemptor]

    if not found.preempted:
        if len(waiting) == 1 and not found.admitted and waiting[0].preempted_by is None:
            (only,) = waiting
            # What stops anyway, or has just ended, makes room without a preemption.
            held = [one for one in active if not one.is_stopping]
            needed = only.min_resources.cpus + sum(one.max_resources.cpus for one in held)
            kept = [one for one in held if not one.preemptible or one.priority >= only.priority]
            assert (
                found.reasons[only.id].startswith("waits for the quota")
                or (len(held) < max_active and needed <= cpus)
                or len(kept) == len(held)
                or not fits(only, kept)
            )
        return
    (preemptor,) = [one for one in waiting if one.id in found.preempted.values()]
    gone = [one for one in active if one.id in found.preempted]
    assert len(gone) == len(found.preempted)
    assert all(one.preemptible and one.priority < preemptor.priority for one in gone)
    assert not any(one.is_stopping for one in gone)
    assert preemptor.preempted_by is None
    assert preemptor.id not in [one.id for one in found.admitted]
    # What stops anyway counts as gone, here and in the plan.
    left = [one for one in active if one not in gone and not one.is_stopping]
    assert fits(preemptor, left)
    assert not any(fits(preemptor, [*left, one]) for one in gone)


def test_the_lowest_priority_and_then_the_youngest_job_is_preempted():
    lowest, old, young = low(2, priority=-2, waited=99), low(2, waited=9), low(2, waited=1)
    urgent = job(2)
    full = cluster(6, 0)
    assert preempt([urgent], [old, young, lowest], full) == ({lowest.id: urgent.id}, [])
    assert preempt([urgent], [old, young], cluster(4, 0)) == ({young.id: urgent.id}, [])
    # The small one of the lowest priority does not suffice, and is not needed with the other.
    big, large = low(4), job(4)
    assert preempt([large], [lowest, big], full) == ({big.id: large.id}, [])
    assert preempt([job(6)], [old, young, low(2, preemptible=False)], full) == ({}, [])


def test_an_elastic_job_is_preempted_for_what_it_may_hold_above_its_minimum():
    victim, urgent = low(2, 8), job(4)
    assert preempt([urgent], [victim], cluster(8, 0)) == ({victim.id: urgent.id}, [])


def test_a_job_is_preempted_for_a_slot():
    victim, urgent = low(1), job(1)
    assert preempt([urgent], [victim], cluster(9, 8), max_active=1) == ({victim.id: urgent.id}, [])


def test_equal_priorities_and_jobs_without_quota_do_not_preempt():
    victim = low(2)
    assert preempt([job(2, priority=-1)], [victim], cluster(2, 0)) == ({}, [])
    assert preempt([job(2)], [victim], cluster(2, 0), quotas={"ann": Quota(cpus=3)}) == ({}, [])


def test_freed_resources_are_kept_for_the_job_that_preempted():
    victim, other = low(2), job(1, waited=9, owner="bob", priority=-1)
    # Neither is the free CPU given away on which the preemption counts, ...
    large = job(3)
    assert preempt([large, other], [victim], cluster(3, 1)) == ({victim.id: large.id}, [])
    # ... nor what becomes free before the preempted job has ended, nor after it.
    stopping = replace(victim, is_stopping=True, preempted_by=large.id)
    assert preempt([large, other], [stopping], cluster(3, 1)) == ({}, [])
    back = replace(victim, queued_at=NOW, preempted_by=large.id, has_workers=False)
    assert preempt([large, other, back], [], cluster(3, 2)) == ({}, [])
    assert preempt([large, other, back], [], cluster(3)) == ({}, [large.id])
    # A job of the same priority comes after it, and one of a higher priority before it.
    equal, higher = job(1, owner="bob", waited=9), job(1, priority=1)
    assert preempt([large, equal, back], [], cluster(3)) == ({}, [large.id])
    assert preempt([large, higher, back], [], cluster(3)) == ({}, [higher.id])
    # What a larger job of a higher priority cannot use is given to it all the same.
    higher = job(4, priority=1)
    assert preempt([large, higher, back], [low(1, preemptible=False)], cluster(4, 3)) == ({}, [large.id])
    # Without it, the others take what it left.
    assert preempt([back, other], [], cluster(3))[1] == [other.id, back.id]


def test_a_job_that_preempted_and_waits_for_its_quota_keeps_nothing():
    large = job(2, owner="cat", priority=1)
    preemptor, small = job(1, owner="bob"), job(1, owner="ann", priority=-1)
    back = low(1, has_workers=False, preempted_by=preemptor.id, owner="dan", priority=-2)
    holder = job(1, owner="bob", has_workers=True)
    waiting, has = [large, preemptor, small, back], cluster(2, 1)
    assert preempt(waiting, [holder], has, quotas={"bob": Quota(cpus=1)}) == ({}, [small.id])
    # With quota, it starts; one that is too large keeps the resources, and is the job that is named.
    assert preempt(waiting, [holder], has) == ({}, [preemptor.id])
    wide = replace(preemptor, min_resources=Resources(2), max_resources=Resources(2))
    found = plan([large, wide, small, back], [holder], has, Policy(max_active=8), NOW)
    assert found.admitted == []
    assert found.reasons[small.id] == f"waits behind {wide.id}, which preempts others for 2 CPUs"


def test_a_preemptible_job_does_not_overtake_by_starvation():
    """It would be preempted again by the first job that it overtakes."""
    old = low(1, has_workers=False, waited=7 * 3600)
    urgent = job(1)
    assert preempt([old, urgent], [], cluster(1)) == ({}, [urgent.id])


def test_a_preempted_job_does_not_preempt_in_turn():
    back = low(2, has_workers=False, preempted_by="job-gone")
    assert preempt([back], [low(2, priority=-2)], cluster(2, 0)) == ({}, [])


def test_jobs_that_have_just_ended_cause_no_preemption():
    """Ray still reports their resources as used."""
    assert preempt([job(2)], [low(2)], cluster(4, 0)) == ({}, [])


def of_types(**gpus):
    """A cluster with a node per type of GPU, all free, and many CPUs."""
    nodes = tuple(
        Node(name, Resources(64, count), Resources(64, count), 0, accelerator_type=name)
        for name, count in gpus.items()
    )
    whole = Resources(64 * len(nodes), sum(gpus.values()))
    return Cluster(whole, whole, nodes=nodes)


def typed(gpus, kind, **changes):
    needs = Resources(gpus, gpus)
    return replace(job(gpus, **changes), accelerator_type=kind, min_resources=needs, max_resources=needs)


def test_a_type_of_gpu_is_waited_for_while_others_are_free():
    has = of_types(A100=2, L4=8)
    first, second, other = typed(2, "A100", waited=3), typed(1, "A100", waited=2), typed(4, "L4", waited=1)
    assert admit([first, second, other], [], has) == [first, other]
    found = plan([typed(4, "A100")], [], has, Policy(max_active=8), NOW)
    assert [*found.reasons.values()] == ["needs 4 GPUs of type A100, but the whole cluster has 2"]
    # An autoscaler may add nodes of the type, of which none is there yet.
    assert len(admit([typed(4, "H100")], [], has, autoscaled=Resources(cpus=400, gpus=20))) == 1


def test_a_type_of_gpu_is_admitted_into_the_nodes_that_an_autoscaler_would_add():
    has, busy = used_up(of_types(A100=4)), replace(typed(4, "A100"), has_workers=True)
    more = {"autoscaled": Resources(gpus=16)}
    assert admit([typed(4, "A100")], [busy], has) == []
    assert len(admit([typed(4, "A100") for _ in range(4)], [busy], has, **more)) == 3
    assert admit([typed(13, "A100")], [busy], has, **more) == []
    # Growth of one type is not there for another one as well.
    both = used_up(of_types(A100=4, L4=4))
    holding = [busy, replace(typed(4, "L4"), has_workers=True)]
    assert len(admit([typed(8, "A100"), typed(8, "L4")], holding, both, **more)) == 1


def test_gpus_of_a_type_are_not_given_twice_while_ray_still_reports_them_as_free():
    has = of_types(A100=4, T4=4)
    placed = replace(typed(4, "A100"), has_workers=True)
    assert admit([typed(4, "A100")], [placed], has) == []
    assert len(admit([typed(4, "T4")], [placed], has)) == 1


def test_gpus_of_types_are_added_up_once_however_many_jobs_wait():
    """Once per job took 0.34 s for 2,000 jobs and 1,000 nodes."""

    class Nodes(tuple):
        iterations = 0

        def __iter__(self):
            Nodes.iterations += 1
            return super().__iter__()

    has = of_types(A100=2)
    waiting = [typed(2, "A100") for _ in range(50)]
    assert len(admit(waiting, [], replace(has, nodes=Nodes(has.nodes)))) == 1
    assert 1 <= Nodes.iterations <= 2


def test_a_job_preempts_jobs_of_its_own_type_of_gpu():
    busy = of_types(A100=2, L4=2)
    busy = replace(
        busy, free=Resources(124, 0), nodes=tuple(replace(n, free=Resources(62, 0)) for n in busy.nodes)
    )
    victims = [
        replace(typed(2, kind, priority=-1), preemptible=True, has_workers=True) for kind in ("L4", "A100")
    ]
    urgent = typed(1, "A100")
    assert preempt([urgent], victims, busy)[0] == {victims[1].id: urgent.id}


def used_up(has):
    """The same cluster without free GPUs."""
    nodes = tuple(replace(node, free=Resources(node.free.cpus, 0)) for node in has.nodes)
    return replace(has, free=Resources(has.free.cpus, 0), nodes=nodes)


def test_a_job_with_a_type_of_gpu_preempts_jobs_without_one_if_that_makes_room():
    untyped = low(2, min_resources=Resources(2, 2), max_resources=Resources(2, 2))
    urgent = typed(2, "A100")
    assert preempt([urgent], [untyped], used_up(of_types(A100=2)))[0] == {untyped.id: urgent.id}
    # Which GPUs it holds is not known here.
    assert preempt([urgent], [untyped], used_up(of_types(A100=2, L4=2)))[0] == {}
    # The job lacks CPUs alone.
    on_cpus = low(63)
    has = of_types(A100=2)
    has = replace(has, free=Resources(1, 2))
    assert preempt([urgent], [on_cpus], has)[0] == {on_cpus.id: urgent.id}

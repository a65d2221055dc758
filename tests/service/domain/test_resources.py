from dataclasses import replace

import pytest

from service.domain.resources import NO_RESOURCES, Cluster, Node, Resources, max_resources, min_resources
from trainer.jobspec import JobSpec

NODES = (
    Node("one", Resources(16, 4), Resources(8, 1), 0, "A100"),
    Node("two", Resources(16, 2), Resources(16, 2), 0, "L4"),
    Node("three", Resources(16, 0), Resources(16, 0), 0),
)
CLUSTER = Cluster(Resources(48, 6), Resources(40, 3), nodes=NODES)


def test_amounts_are_added_and_compared_per_resource():
    assert Resources(3, 1) + Resources(1, 2) - Resources(2, 2) == Resources(2, 1)
    assert Resources(2, 1).fits(Resources(2, 1))
    assert not Resources(2, 1).fits(Resources(9, 0))
    assert Resources(2, 3).at_most(Resources(5, 1)) == Resources(2, 1)
    assert Resources(2, 3).at_least(Resources(5, 1)) == Resources(5, 3)
    assert (str(Resources(0.5)), str(Resources(2, 1))) == ("0.5 CPUs", "2 CPUs and 1 GPUs")


def test_the_dominant_share_is_that_of_the_scarcer_resource():
    assert Resources(2, 3).share_of(Resources(10, 4)) == 0.75
    assert Resources(2, 3).share_of(Resources(10, 0)) == 0.2
    assert NO_RESOURCES.share_of(NO_RESOURCES) == 0


def test_a_cluster_has_the_gpus_of_each_type():
    assert CLUSTER.of_type("A100") == replace(CLUSTER, total=Resources(48, 4), free=Resources(40, 1))
    assert CLUSTER.of_type("H100").total.gpus == 0
    assert [CLUSTER.has_type(kind) for kind in ("A100", "L4", "H100")] == [True, True, False]


@pytest.mark.parametrize(
    ("nodes", "wanted", "expected"),
    [(NODES, "A100", True), (NODES, "L4", False), (NODES, None, False), (NODES[:1] + NODES[2:], None, True)],
)
def test_the_type_of_gpu_is_known_if_it_is_asked_for_or_the_only_one(nodes, wanted, expected):
    assert replace(CLUSTER, nodes=nodes).gives_type("A100", wanted) is expected


def test_an_autoscaler_adds_to_all_types_and_takes_nothing_away():
    grown = CLUSTER.grown_to(Resources(100, 10))
    assert (grown.total, grown.free, grown.added) == (Resources(100, 10), Resources(92, 7), Resources(52, 4))
    assert grown.of_type("H100").total.gpus == 4
    assert CLUSTER.grown_to(Resources(1)) == CLUSTER


@pytest.mark.parametrize("use_gpu", [False, True])
def test_a_worker_takes_a_cpu_and_a_gpu_if_it_uses_them(use_gpu):
    spec = JobSpec(steps=1, num_workers=[2, 4], use_gpu=use_gpu)
    assert min_resources(spec) == Resources(2, 2 if use_gpu else 0)
    assert max_resources(spec) == Resources(4, 4 if use_gpu else 0)

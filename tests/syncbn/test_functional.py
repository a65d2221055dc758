import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from syncbn import GroupError, InputError, SyncBatchNorm, sync_batch_norm
from tests.dist import run_on_ranks
from tests.syncbn.collective_recorder import record_collectives
from tests.syncbn.reference import expect, make_case, relative_error

WORLD_SIZES = [1, 2, 3, 4, 8]
# (dtype, mean of the values whose standard deviation is about 1, largest error of output, gradients and
# variance)
PRECISIONS = [
    (torch.float64, 0.0, 1e-13, 1e-13, 1e-13),
    (torch.float64, 100.0, 1e-12, 1e-12, 1e-12),
    (torch.float32, 0.0, 1e-6, 1e-6, 1e-12),
    (torch.float32, 100.0, 1e-6, 1e-6, 1e-10),
    (torch.float32, 1e4, 1e-6, 1e-6, 1e-6),
]


def shares(world_size):
    """Numbers of samples by rank: even, uneven, and with one rank empty."""
    return [
        [4] * world_size,
        [3 + 2 * rank for rank in range(world_size)],
        [0 if rank == world_size // 2 and world_size > 1 else 5 for rank in range(world_size)],
    ]


def normalise(cases):
    """Run each case on this rank; return output, gradients and moments."""
    results = []
    for case in cases:
        x = case.shards[dist.get_rank()].clone().requires_grad_()
        weight, bias = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()
        y, moments = sync_batch_norm(x, weight, bias)
        y.backward(case.gradients[dist.get_rank()])
        results.append((y.detach(), x.grad, weight.grad, bias.grad, moments))
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_gets_what_one_device_computes(world_size):
    settings, cases = [], []
    for dtype, shift, *tolerances in PRECISIONS:
        # Many ranks share few cores here: the hardest of the cases will do for eight.
        for counts in shares(world_size) if world_size < 8 else shares(world_size)[2:]:
            for rest in [(), (3, 4)] if world_size < 8 else [(3, 4)]:
                settings.append(tolerances)
                cases.append(make_case(counts, rest=rest, dtype=dtype, shift=shift))
    results = run_on_ranks(normalise, world_size, cases)
    for index, (tolerances, case) in enumerate(zip(settings, cases, strict=True)):
        check_against_one_device([result[index] for result in results], case, *tolerances)


def check_against_one_device(results, case, output_tolerance, gradient_tolerance, variance_tolerance):
    expected = expect(case)
    for rank, (y, dx, _, _, moments) in enumerate(results):
        assert y.dtype == dx.dtype == case.shards[rank].dtype
        assert relative_error(y, expected.outputs[rank]) <= output_tolerance
        assert relative_error(dx, expected.gradients[rank]) <= gradient_tolerance
        assert moments.count == expected.count
        assert relative_error(moments.mean, expected.mean) <= 1e-13
        assert relative_error(moments.variance, expected.variance) <= variance_tolerance
        assert torch.equal(moments.pack(), results[0][4].pack()), (
            "the statistics differ in bits between ranks"
        )
    assert (
        relative_error(sum(result[2] for result in results), expected.weight_gradient) <= gradient_tolerance
    )
    assert relative_error(sum(result[3] for result in results), expected.bias_gradient) <= gradient_tolerance


@pytest.mark.dist
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [1, 3])
def test_half_precision_is_rounded_once(dtype, world_size):
    cases = [make_case(counts, dtype=dtype) for counts in shares(world_size)]
    results = run_on_ranks(normalise, world_size, cases)
    for index, case in enumerate(cases):
        expected = expect(case)
        for rank, result in enumerate(results):
            for actual, exact in zip(
                result[index][:2], (expected.outputs[rank], expected.gradients[rank]), strict=True
            ):
                # Half a unit in the last place, and a little where the exact value is almost half-way between
                # two.
                assert (
                    (actual.double() - exact).abs() <= torch.finfo(dtype).eps * 0.502 * exact.abs() + 1e-7
                ).all()


def lay_out(x, layout):
    match layout:
        case "view":
            return torch.stack([x, x], dim=-1)[..., 0]
        case "channels_innermost":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        case "expanded":
            return x[:, :, :1].expand_as(x) if x.dim() > 2 else x[:1].expand_as(x)
    return x.contiguous()


LAYOUTS = ["contiguous", "view", "channels_innermost", "expanded"]


def normalise_layouts(shape):
    """Compare, on every layout of input and output gradient, with the contiguous one, and return all
    strides.
    """
    generator = torch.Generator().manual_seed(dist.get_rank())
    values, gradient = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    strides = []
    for layout in LAYOUTS:
        same = lay_out(values, layout).contiguous().detach().requires_grad_()
        y_same, _ = sync_batch_norm(same)
        y_same.backward(gradient)
        for gradient_layout in LAYOUTS[:3]:
            x = lay_out(values, layout).detach().requires_grad_()
            y, _ = sync_batch_norm(x)
            y.backward(lay_out(gradient, gradient_layout))
            torch.testing.assert_close(y, y_same, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(x.grad, same.grad, rtol=1e-12, atol=1e-12)
            strides.append((layout, x.stride(), y.stride(), x.grad.stride()))
    return strides


@pytest.mark.dist
@pytest.mark.parametrize(
    "shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (4, 3, 5, 6, 2), (1, 3, 5, 6), (4, 1, 5, 6)]
)
def test_any_layout_is_taken_and_the_memory_format_is_kept(shape):
    for layout, x, y, dx in run_on_ranks(normalise_layouts, 2, shape)[0]:
        if layout in ("contiguous", "channels_innermost"):
            assert x == y == dx
        else:
            assert y == torch.empty(shape).stride()


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 2), torch.channels_last_3d)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_channels_last_is_kept_in_output_and_gradient(shape, memory_format, dtype):
    x = torch.randn(shape).to(dtype).to(memory_format=memory_format).requires_grad_()
    y, _ = sync_batch_norm(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn(shape).to(dtype))
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


def normalise_nothing(dtype):
    x = torch.empty(0, 3, 4, dtype=dtype, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    y, moments = sync_batch_norm(x, weight, bias)
    y.sum().backward()
    return y.detach(), x.grad, weight.grad, bias.grad, moments


@pytest.mark.dist
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nothing_on_any_rank_gives_nothing_and_no_nan(dtype):
    for y, dx, weight_gradient, bias_gradient, moments in run_on_ranks(normalise_nothing, 2, dtype):
        assert y.shape == dx.shape == (0, 3, 4)
        assert not torch.cat([weight_gradient, bias_gradient]).any()
        assert not moments.pack().any()


def normalise_single_value(dtype, holder):
    x = torch.ones(1 if dist.get_rank() == holder else 0, 3, dtype=dtype)
    with pytest.raises(ValueError, match="all ranks together must have 2 or more values per channel"):
        sync_batch_norm(x)
    return sync_batch_norm(torch.ones(2, 3))[1].count.item()


@pytest.mark.dist
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_value_on_all_ranks_raises_on_every_rank(dtype):
    assert run_on_ranks(normalise_single_value, 3, dtype, 1) == [6.0, 6.0, 6.0]


def normalise_one_value_each():
    return sync_batch_norm(torch.tensor([[float(dist.get_rank())]]), eps=0.0)[0].item()


@pytest.mark.dist
def test_one_value_on_each_rank_is_enough():
    assert run_on_ranks(normalise_one_value_each, 2) == [-1.0, 1.0]


def normalise_with_gradients_on_some_ranks(case):
    rank = dist.get_rank()
    x = case.shards[rank].clone().requires_grad_(rank == 1)
    weight = case.weight.clone().requires_grad_()
    y, _ = sync_batch_norm(x, weight, case.bias)
    y.backward(case.gradients[rank])
    return x.grad


@pytest.mark.dist
def test_ranks_that_need_no_gradient_of_their_input_still_take_part():
    case = make_case([3, 4, 0])
    results = run_on_ranks(normalise_with_gradients_on_some_ranks, 3, case)
    assert results[0] is None
    assert results[2] is None
    assert relative_error(results[1], expect(case).gradients[1]) <= 1e-13


def record_normalisation(case):
    with record_collectives() as issued:
        normalise([case])
    return issued


@pytest.mark.dist
@pytest.mark.parametrize(
    ("dtype", "forward"),
    [(torch.float64, "all_gather"), (torch.float32, "all_reduce"), (torch.bfloat16, "all_reduce")],
)
def test_one_collective_forward_and_one_backward(dtype, forward):
    channels = 7
    results = run_on_ranks(record_normalisation, 3, make_case([4, 2, 0], channels, dtype=dtype))
    assert results == [[(forward, 8 * (2 * channels + 2)), ("all_reduce", 8 * (2 * channels + 2))]] * 3
    assert run_on_ranks(record_normalisation, 1, make_case([4], channels, dtype=dtype)) == [[]]


def normalise_in_groups(cases):
    group, *_ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    rank = dist.get_rank()
    case = cases[rank % 2]
    x = case.shards[rank // 2].clone().requires_grad_()
    y, _ = sync_batch_norm(x, case.weight, case.bias, process_group=group)
    y.backward(case.gradients[rank // 2])
    return y.detach(), x.grad


@pytest.mark.dist
def test_each_group_has_its_own_statistics():
    cases = [make_case([3, 5], seed=1), make_case([2, 4], seed=2)]
    results = run_on_ranks(normalise_in_groups, 4, cases)
    for rank, (y, dx) in enumerate(results):
        expected = expect(cases[rank % 2])
        assert relative_error(y, expected.outputs[rank // 2]) <= 1e-13
        assert relative_error(dx, expected.gradients[rank // 2]) <= 1e-13


BAD_INPUTS = [
    (
        torch.ones(4, 3, dtype=torch.int64),
        r"dtype must be one of torch.float16, torch.bfloat16, torch.float32, torch.float64 \(got "
        r"torch.int64\)",
    ),
    (torch.ones(4, 3, dtype=torch.complex64), r"\(got torch.complex64\)"),
    (torch.ones(3), r"must have two or more dimensions, \(N, C, \*\) \(got shape \(3,\)\)"),
    (torch.ones(4, 0, 5), r"one or more channels C in \(N, C, \*\) \(got shape \(4, 0, 5\)\)"),
    (
        torch.ones(4, 2, 5),
        r"weight: must have one element per channel, 2 for an input of shape \(4, 2, 5\) \(got shape "
        r"\(3,\)\)",
    ),
    (torch.ones(4, 3, device="meta"), r"weight: must be on the device of the input, meta \(got cpu\)"),
]


@pytest.mark.parametrize(("x", "message"), BAD_INPUTS)
def test_bad_input_is_refused_with_what_came_and_what_is_taken(x, message):
    with pytest.raises(InputError, match=message):
        sync_batch_norm(x, torch.ones(3))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize(
    "make",
    [lambda: sync_batch_norm, lambda: SyncBatchNorm(4), lambda: SyncBatchNorm(4).eval()],
    ids=["function", "train", "eval"],
)
def test_a_nested_tensor_is_refused_with_its_type_and_a_remedy(make, layout):
    x = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)], layout=layout)
    message = rf"input: must be a dense tensor \(got NestedTensor, {layout}\); pad it, and pass a mask"
    with pytest.raises(InputError, match=message):
        make()(x)


def refuse_distributed_tensors():
    mesh = init_device_mesh("cpu", (2,))
    x, weight = (distribute_tensor(torch.ones(shape), mesh, [Shard(0)]) for shape in ((4, 3), (3,)))
    with record_collectives() as issued:
        for normalise in (sync_batch_norm, SyncBatchNorm(3), SyncBatchNorm(3).eval()):
            with pytest.raises(InputError, match=r"input: .* \(got DTensor\); .* tensor\.to_local\(\)"):
                normalise(x)
        with pytest.raises(InputError, match=r"weight: .* \(got DTensor\)"):
            sync_batch_norm(torch.ones(4, 3), weight)
    sync_batch_norm(x.to_local())
    return issued


@pytest.mark.dist
def test_distributed_tensors_are_refused_before_any_collective():
    assert run_on_ranks(refuse_distributed_tensors, 2) == [[], []]


def refuse_bad_input(x, message):
    with record_collectives() as issued, pytest.raises(InputError, match=message):
        sync_batch_norm(x, torch.ones(3))
    return issued


@pytest.mark.dist
def test_bad_input_is_refused_before_any_collective():
    for x, message in BAD_INPUTS[:-1]:
        assert run_on_ranks(refuse_bad_input, 2, x, message) == [[], []]


def refuse_foreign_group():
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(GroupError, match="rank 1 is not in the process group"):
            sync_batch_norm(torch.ones(4, 3), process_group=group)
    else:
        sync_batch_norm(torch.ones(4, 3), process_group=group)


@pytest.mark.dist
def test_a_group_that_the_rank_is_not_in_is_refused():
    run_on_ranks(refuse_foreign_group, 2)


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_gradient_is_that_of_the_function(shape, affine):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(2, shape[1], dtype=torch.float64).requires_grad_().unbind() if affine else ()
    assert torch.autograd.gradcheck(lambda *inputs: sync_batch_norm(*inputs)[0], (x, *vectors))


def normalise_with_nan():
    x = torch.randn(4, 3)
    if dist.get_rank() == 1:
        x[2, 1] = torch.nan
    return sync_batch_norm(x)[0].isnan()


@pytest.mark.dist
def test_a_nan_shows_on_every_rank_and_stays_in_its_channel():
    for is_nan in run_on_ranks(normalise_with_nan, 2):
        assert torch.equal(is_nan, torch.tensor([False, True, False]).expand(4, 3))


def test_counts_do_not_overflow_in_half_precision():
    x = (torch.randn(70_000, 1) * 100).half().requires_grad_()
    weight = torch.ones(1, dtype=torch.float16, requires_grad=True)
    y, moments = sync_batch_norm(x, weight)
    y.backward(y.detach())
    assert moments.count == 70_000
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert y.double().var(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_parameters_may_have_another_dtype_and_get_gradients_in_it():
    x = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    y, _ = sync_batch_norm(x, weight, bias)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (weight.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_normalises_without_gradients(context):
    x = torch.randn(4, 3)
    with context():
        y, _ = sync_batch_norm(x)
    assert torch.equal(y, sync_batch_norm(x)[0])


def normalise_beside_a_default_device():
    x = torch.randn(4, 3)
    with torch.device("meta"):
        y, _ = sync_batch_norm(x)
    torch.testing.assert_close(y, sync_batch_norm(x)[0])


@pytest.mark.dist
def test_the_default_device_is_left_alone():
    run_on_ranks(normalise_beside_a_default_device, 2)

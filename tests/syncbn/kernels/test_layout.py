import pytest
import torch

from syncbn.kernels.layout import (
    along_channels,
    arrange,
    arrange_like,
    is_columns,
    rearrange,
    reduced_dimensions,
)

LAYOUTS = {
    "rows": (torch.randn(2, 3, 4, 5), False),
    "channels_last": (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
    "channels_last_3d": (torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), True),
    "vectors": (torch.randn(2, 3), True),
    "one position": (torch.randn(2, 3, 1, 1), True),
    "sequences": (torch.randn(2, 5, 3).transpose(1, 2), True),
    "one channel": (torch.randn(2, 1, 4, 5), False),
    "view": (torch.randn(2, 3, 4, 10)[..., ::2], False),
    "expanded": (torch.randn(2, 3, 1, 5).expand(2, 3, 4, 5), False),
    "part": (torch.randn(2, 5, 6, 3)[:, 1:3].movedim(-1, 1), False),
    "empty": (torch.randn(0, 3, 4), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_arranged_and_put_back(layout):
    x, columns = LAYOUTS[layout]
    values = arrange(x)
    assert values.is_contiguous()
    assert values.shape == ((x.numel() // x.shape[1], x.shape[1]) if columns else x.shape)
    assert torch.equal(rearrange(values, x, values), x)
    if layout not in ("view", "expanded", "part"):
        assert values.data_ptr() == x.data_ptr()  # no copy
        assert rearrange(values, x, values).stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_in_any_layout_is_arranged_like_its_input(layout):
    x, _ = LAYOUTS[layout]
    values = arrange(x)
    for dy in (x, x.contiguous(), x.movedim(1, -1).contiguous().movedim(-1, 1)):
        assert torch.equal(arrange_like(dy, values), values)


def test_columns_are_dense_and_have_channels_innermost():
    assert is_columns(torch.randn(2, 4, 5, 3).movedim(-1, 1))
    assert not is_columns(torch.randn(2, 4, 5, 6).movedim(-1, 1)[:, :3])
    assert not is_columns(torch.randn(4, 2, 5, 3).movedim(-1, 1).transpose(0, 2))


def test_all_dimensions_but_the_channels_are_reduced():
    assert [reduced_dimensions(torch.zeros(2, 3, *rest)) for rest in ((), (4,), (4, 5))] == [
        (0,),
        (0, 2),
        (0, 2, 3),
    ]
    assert along_channels(torch.zeros(3), torch.zeros(2, 3, 4, 5)).shape == (3, 1, 1)

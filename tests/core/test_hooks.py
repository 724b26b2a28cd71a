"""Captured outputs equal hand-placed hooks; steering moves what it should and nothing else."""

import pytest
import torch
from torch import Tensor, nn

from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured_outputs, steered


class Block(nn.Module):
    """Counts its calls; returns a tuple if asked to, as some transformer layers do."""

    def __init__(self, scale: float, as_tuple: bool = False) -> None:
        super().__init__()
        self.scale, self.as_tuple, self.n_calls = scale, as_tuple, 0

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        self.n_calls += 1
        y = x * self.scale + 1
        return (y, None) if self.as_tuple else y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(i + 2.0, as_tuple=i == 1) for i in range(4))
        self.unused = Block(0.0)
        self.config = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            x = y[0] if isinstance(y, tuple) else y
        return x.add_(100)  # changes the last layer's output in place


def n_calls(model: Model) -> list[int]:
    return [layer.n_calls for layer in model.layers]  # type: ignore[misc]


def test_captured_outputs_equal_hand_placed_hooks() -> None:
    model, x, by_hand = Model(), torch.arange(6.0).reshape(2, 3), {}
    handle = model.layers[2].register_forward_hook(
        lambda module, inputs, output: by_hand.update(layer=output)
    )
    model(x)
    handle.remove()
    with captured_outputs(model, ["layers.2", "layers.1"]) as outputs:
        model(x)
    assert torch.equal(outputs["layers.2"], by_hand["layer"])
    # layers 0 and 1: (2x + 1) * 3 + 1
    assert torch.equal(outputs["layers.1"], (2 * x + 1) * 3 + 1)


def test_modules_after_the_last_hookpoint_do_not_run() -> None:
    model = Model()
    with captured_outputs(model, ["layers.1", "layers.0"]):
        model(torch.ones(1, 1))
    assert n_calls(model) == [1, 1, 0, 0]


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="mine"), captured_outputs(model, ["layers.3"]):
        raise RuntimeError("mine")
    with captured_outputs(model, ["layers.0"]):
        model(torch.ones(1, 1))
    assert all(not module._forward_hooks for module in model.modules())
    assert model(torch.ones(1, 1)).shape == (1, 1)


def test_a_captured_output_is_not_changed_by_later_in_place_operations() -> None:
    model = Model()
    hookpoints = ["layers.3", "config"]
    with (
        pytest.raises(ModelError, match="did not run"),
        captured_outputs(model, hookpoints) as outputs,
    ):
        model(torch.zeros(1, 1))
    # ((0 * 2 + 1) * 3 + 1) = 4, * 4 + 1 = 17, * 5 + 1 = 86
    assert outputs["layers.3"].item() == 86


def test_a_hookpoint_that_never_runs_is_an_error_that_names_it() -> None:
    model = Model()
    with pytest.raises(ModelError, match="'unused'"), captured_outputs(model, ["unused"]):
        model(torch.ones(1, 1))


def test_an_unknown_hookpoint_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"layers\.1"), captured_outputs(Model(), ["layer.1"]):
        pytest.fail("the block must not be entered")


def test_captures_may_be_nested() -> None:
    model, x = Model(), torch.ones(1, 1)
    with captured_outputs(model, ["layers.3"]) as outer:
        with captured_outputs(model, ["layers.0"]) as inner:
            model(x)
        model(x)
    assert inner["layers.0"].item() == 3
    assert set(outer) == {"layers.3"}


VECTORS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 10.0, 0.0]])


def test_each_row_is_steered_by_its_own_vector() -> None:
    model, x = Model(), torch.zeros(2, 2, 3)
    clean = model(x.clone())
    with steered(model, "layers.2", VECTORS):
        found = model(x.clone())
    # layer 3 multiplies by 5
    assert torch.equal(found - clean, (5 * VECTORS)[:, None].expand(2, 2, 3))


def test_a_tuple_keeps_its_other_items() -> None:
    model = Model()
    with captured_outputs(model, ["layers.3"]) as clean:
        model(torch.zeros(2, 1, 3))
    with steered(model, "layers.1", VECTORS):
        output = model.layers[1](torch.zeros(2, 1, 3))
        with captured_outputs(model, ["layers.3"]) as found:
            model(torch.zeros(2, 1, 3))
    assert output[1] is None
    # layers 2 and 3 multiply by 4 and 5
    assert torch.equal((found["layers.3"] - clean["layers.3"])[:, 0], 20 * VECTORS)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_only_the_places_named_are_steered_in_the_first_pass_and_all_in_later_ones(
    padding: str,
) -> None:
    model, x = Model(), torch.zeros(2, 3, 3)
    last = torch.tensor([[False, False, True], [False, False, True]])
    if padding == "right":  # the second row is a token shorter
        last[1] = torch.tensor([False, True, False])
    with steered(model, "layers.3", VECTORS, last):
        first, later = model(x.clone()), model(torch.zeros(2, 1, 3))
    moved = first - model(x.clone())
    assert torch.equal((moved != 0).any(dim=-1), last)
    assert torch.equal(moved.sum(dim=1), VECTORS)
    assert torch.equal((later - model(torch.zeros(2, 1, 3)))[:, 0], VECTORS)


def test_a_vector_of_zeros_changes_no_bit_of_a_bfloat16_output() -> None:
    model = Model()
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    with steered(model, "layers.0", torch.zeros(2, 3)):
        found = model(x.clone())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, model(x.clone()))


def test_steering_ends_with_the_block_also_after_an_error() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="mine"), steered(model, "layers.0", VECTORS):
        raise RuntimeError("mine")
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("shape", [(3, 2, 3), (2, 2, 4), (2, 3)])
def test_steering_that_does_not_fit_the_output_is_an_error_that_names_both(
    shape: tuple[int, ...],
) -> None:
    model = Model()
    with (
        pytest.raises(ModelError, match=r"'layers\.0': output of shape \(.*wanted \(2, "),
        steered(model, "layers.0", VECTORS),
    ):
        model(torch.zeros(shape))


def test_steering_at_an_unknown_hookpoint_is_an_error_that_names_the_nearest() -> None:
    with (
        pytest.raises(ModelError, match=r"layers\.1"),
        steered(Model(), "layer.1", VECTORS),
    ):
        pytest.fail("the block must not be entered")

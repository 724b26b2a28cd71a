"""Captured outputs equal hand-placed hooks, and nothing after the last hookpoint runs."""

import pytest
import torch
from torch import Tensor, nn

from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured_outputs


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

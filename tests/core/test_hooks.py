"""What is captured equals hand-placed hooks; steering moves what it should and nothing else."""

import pytest
import torch
from torch import Tensor, nn

from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured, edited, steered


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
    with captured(model, ["layers.2", "layers.1"]) as outputs:
        model(x)
    assert torch.equal(outputs["layers.2"], by_hand["layer"])
    # layers 0 and 1: (2x + 1) * 3 + 1
    assert torch.equal(outputs["layers.1"], (2 * x + 1) * 3 + 1)


def test_modules_after_the_last_hookpoint_do_not_run() -> None:
    model = Model()
    with captured(model, ["layers.1", "layers.0"]):
        model(torch.ones(1, 1))
    assert n_calls(model) == [1, 1, 0, 0]


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="mine"), captured(model, ["layers.3"]):
        raise RuntimeError("mine")
    with captured(model, ["layers.0"]):
        model(torch.ones(1, 1))
    assert all(not module._forward_hooks for module in model.modules())
    assert model(torch.ones(1, 1)).shape == (1, 1)


def test_a_captured_output_is_not_changed_by_later_in_place_operations() -> None:
    model = Model()
    hookpoints = ["layers.3", "config"]
    with (
        pytest.raises(ModelError, match="did not run"),
        captured(model, hookpoints) as outputs,
    ):
        model(torch.zeros(1, 1))
    # ((0 * 2 + 1) * 3 + 1) = 4, * 4 + 1 = 17, * 5 + 1 = 86
    assert outputs["layers.3"].item() == 86


def test_a_hookpoint_that_never_runs_is_an_error_that_names_it() -> None:
    model = Model()
    with pytest.raises(ModelError, match="'unused'"), captured(model, ["unused"]):
        model(torch.ones(1, 1))


def test_an_unknown_hookpoint_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"layers\.1"), captured(Model(), ["layer.1"]):
        pytest.fail("the block must not be entered")


def test_captures_may_be_nested() -> None:
    model, x = Model(), torch.ones(1, 1)
    with captured(model, ["layers.3"]) as outer:
        with captured(model, ["layers.0"]) as inner:
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
    with captured(model, ["layers.3"]) as clean:
        model(torch.zeros(2, 1, 3))
    with steered(model, "layers.1", VECTORS):
        output = model.layers[1](torch.zeros(2, 1, 3))
        with captured(model, ["layers.3"]) as found:
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


class Reader(nn.Module):
    """Called with keywords alone, as attention is; has a submodule with the name of a side."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.n_calls = Block(10.0), 0

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        self.n_calls += 1
        return self.output(hidden)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """x + reader(norm(x)), and then once more the norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.reader, self.odd = norm, Reader(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.reader(mask=None, hidden=self.norm(x))
        return y + self.norm(y)


def layer_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(4, eps=0.5)
    nn.init.constant_(norm.weight, 3.0)
    nn.init.constant_(norm.bias, 7.0)
    return norm


class VarianceRMSNorm(nn.Module):
    """Keeps its epsilon under the name that Llama uses, and its scale as Gemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.variance_epsilon, self.weight = 0.5, nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.5)


X = torch.tensor([[[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 1.0, -1.0]]])


def test_an_input_is_what_its_module_is_called_with_also_with_keywords() -> None:
    model = Residual(layer_norm())
    with captured(model, ["norm.input", "reader.input", "norm"]) as found:
        model(X)
    assert torch.equal(found["norm.input"], X)
    assert torch.equal(found["reader.input"], model.norm(X))
    assert torch.equal(found["norm"], model.norm(X))


def test_the_module_whose_input_is_the_last_thing_asked_for_does_not_run() -> None:
    model = Residual(layer_norm())
    with captured(model, ["reader.input", "norm"]):
        model(X)
    assert model.reader.n_calls == 0
    with captured(model, ["reader.input", "reader"]):
        model(X)
    assert model.reader.n_calls == 1


def test_an_input_is_that_of_the_first_call_and_is_not_changed_later() -> None:
    model = Residual(layer_norm())
    model.odd.forward = lambda x: x.add_(1)  # type: ignore[method-assign, assignment]
    with captured(model, ["norm.input", "odd"]) as found:
        x = X.clone()
        model(x)
        model.odd(x)
    assert torch.equal(found["norm.input"], X)


def test_a_module_that_is_called_like_a_side_wins_over_the_side() -> None:
    model = Residual(layer_norm())
    with captured(model, ["reader.output", "reader.output.input", "odd.output"]) as found:
        model(X)
        model.odd(X)
    # the submodule reader.output multiplies what it is given by 10 and adds 1
    assert torch.equal(found["reader.output"], model.norm(X) * 10 + 1)
    assert torch.equal(found["reader.output.input"], model.norm(X))
    assert torch.equal(found["odd.output"], X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_vectors_are_those_before_the_learned_scale_in_float32(
    dtype: torch.dtype,
) -> None:
    model = Residual(layer_norm()).to(dtype)
    with captured(model, ["norm.normalized"]) as found:
        model(X.to(dtype))
    # mean 3, variance 3.5: (1 - 3) / sqrt(3.5 + 0.5) = -1, ...; mean 0, variance 0.5: 1 / 1
    wanted = torch.tensor([[[-1.0, -0.5, 0.0, 1.5], [0.0, 0.0, 1.0, -1.0]]])
    assert found["norm.normalized"].dtype == torch.float32
    assert torch.allclose(found["norm.normalized"], wanted, rtol=1e-6)


def test_an_rms_norm_takes_no_mean_off() -> None:
    model = Residual(VarianceRMSNorm())
    with captured(model, ["norm.normalized", "norm"]) as found:
        model(X)
    # mean of squares 12.5, + 0.5 = 13; second row: 0.5 + 0.5 = 1
    assert torch.allclose(found["norm.normalized"], X / torch.tensor([[[13.0**0.5], [1.0]]]))
    assert torch.allclose(found["norm"], 3 * found["norm.normalized"])


def test_torchs_rms_norm_without_an_epsilon_uses_the_types_smallest_step() -> None:
    model = Residual(nn.RMSNorm(4))
    with captured(model, ["norm.normalized", "norm"]) as found:
        model(X * 1e-4)
    assert torch.allclose(found["norm.normalized"], found["norm"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("hookpoint", ["odd.normalized", "reader.normalized"])
def test_what_is_no_norm_has_no_normalised_vectors(hookpoint: str) -> None:
    with (
        pytest.raises(ModelError, match=rf"'{hookpoint}': the module is a .*, wanted an RMSNorm"),
        captured(Residual(layer_norm()), [hookpoint]),
    ):
        pytest.fail("the block must not be entered")


def test_an_input_that_is_no_tensor_is_an_error_that_names_it() -> None:
    model = Residual(layer_norm())
    with pytest.raises(ModelError, match=r"'odd\.input': there is a int"):  # noqa: SIM117
        with captured(model, ["odd.input"]):
            model.odd(3)


def test_an_unknown_module_with_a_side_names_the_nearest_with_that_side() -> None:
    with (
        pytest.raises(ModelError, match=r"no module 'readr'\. Nearest: reader\.input"),
        captured(Residual(layer_norm()), ["readr.input"]),
    ):
        pytest.fail("the block must not be entered")


def test_an_edited_input_is_what_its_module_alone_is_given() -> None:
    model = Residual(layer_norm())
    with edited(model, "reader.input", lambda hidden: hidden + 1):
        found = model(X)
    by_hand = X + (model.norm(X) + 1) * 10 + 1
    assert torch.equal(found, by_hand + model.norm(by_hand))
    assert torch.equal(model(X), Residual(layer_norm())(X))  # and ends with the block


def test_an_edited_input_of_a_module_that_is_called_by_position() -> None:
    model = Model()
    with edited(model, "layers.2.input", lambda x: x + 1):
        found = model(torch.zeros(1, 1))
    # (0 * 2 + 1) * 3 + 1 = 4, + 1 = 5, * 4 + 1 = 21, * 5 + 1 = 106, + 100
    assert found.item() == 206


def test_steering_an_input_moves_its_module_alone() -> None:
    model, x = Residual(nn.Identity()), torch.zeros(2, 2, 3)
    with steered(model, "reader.input", VECTORS):
        found = model(x)
    # the reader multiplies by 10, and the sum is doubled by the last line
    assert torch.equal(found - model(x), (20 * VECTORS)[:, None].expand(2, 2, 3))


def test_normalised_vectors_cannot_be_edited() -> None:
    with (
        pytest.raises(ModelError, match=r"computed inside the norm.*'norm' .* or 'norm\.input'"),
        edited(Residual(layer_norm()), "norm.normalized", lambda hidden: hidden),
    ):
        pytest.fail("the block must not be entered")

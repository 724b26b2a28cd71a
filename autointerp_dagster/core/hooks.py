"""Read what goes into and comes out of named modules, or change it, while a model runs.

A hookpoint is a module's dotted path, counted from the base model, and a side of it:

- ``layers.9`` or ``layers.9.output``: what the module returns;
- ``layers.9.mlp.input``: what it is called with first;
- ``layers.9.input_layernorm.normalized``: what a norm computes before its learned scale.

A submodule that is really called ``output`` or ``input`` wins over the side.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from autointerp_dagster.core.errors import ModelError

Side = Literal["output", "input", "normalized"]

_SIDES: tuple[Side, ...] = ("output", "input", "normalized")
_EPSILONS = ("eps", "variance_epsilon", "epsilon", "layer_norm_epsilon", "norm_eps")
"""Names that norms give the number that keeps them from dividing by zero."""


class Hookpoint(NamedTuple):
    """A side of a module."""

    path: str
    """Of the module."""
    side: Side


class _StopForwardError(Exception):
    """Ends a forward pass once everything asked for has been captured."""


@contextmanager
def captured(model: nn.Module, hookpoints: Iterable[str]) -> Iterator[Mapping[str, Tensor]]:
    """Capture what stands at hookpoints while ``model`` runs inside the ``with`` block.

    The forward pass ends as soon as everything is captured, and with it the block: what stands
    after the call in the block is not run. For an input, the module itself is not run either. Read
    what was captured after the block.

    Args:
        model: Any module; run it once in the block.
        hookpoints: Counted from ``model``; several may be sides of one module.

    Yields:
        Filled during the forward pass, by hookpoint: a copy of what stands there in the module's
        first call (of the first item, where it is a tuple), on the device where it was computed. It
        is not changed by what the model does next. Normalised vectors are in float32.

    Raises:
        ModelError: If a hookpoint does not exist, does not run, or is no tensor, or the module of a
            normalised one is no norm that is known here.
    """
    names = dict.fromkeys(hookpoints)
    found: dict[str, Tensor] = {}
    stop = _StopForwardError()

    def keep(name: str, hidden: Tensor) -> None:
        if name not in found:
            found[name] = hidden.detach().clone()
            if len(found) == len(names):
                raise stop

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(watched(model, name, partial(keep, name)))
        try:
            yield found
        except _StopForwardError as stopped:
            if stopped is not stop:
                raise
    missing = [name for name in names if name not in found]
    if missing:
        raise ModelError(
            f"hookpoints {missing}: nothing captured, the modules did not run in this forward "
            "pass. Choose modules that every forward pass calls."
        )


@contextmanager
def watched(model: nn.Module, hookpoint: str, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show what stands at a hookpoint to ``see``, in every forward pass inside the ``with`` block.

    Args:
        model: Any module.
        hookpoint: Counted from ``model``.
        see: Is given the tensor itself, which the model may change next.

    Raises:
        ModelError: As for :func:`captured`.
    """
    path, side = parse_hookpoint(model, hookpoint)
    module = model.get_submodule(path)
    parameter = _first_parameter(module)
    normalized = _norm_of(hookpoint, module) if side == "normalized" else None

    def see_output(module: nn.Module, args: object, output: object) -> None:
        del module, args
        see(_tensor_of(hookpoint, output))

    def see_input(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        del module
        hidden = _tensor_of(hookpoint, args[0] if args else kwargs.get(parameter))
        see(hidden if normalized is None else normalized(hidden))

    if side == "output":
        handle = module.register_forward_hook(see_output)
    else:
        handle = module.register_forward_pre_hook(see_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edited(model: nn.Module, hookpoint: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what stands at a hookpoint, in every forward pass inside the ``with`` block.

    Args:
        model: Any module.
        hookpoint: Counted from ``model``. An input is replaced for its module alone: what else
            reads the same tensor, such as a residual connection around the module, is not changed.
        edit: From what stands there (the first item, where it is a tuple) to what the rest of the
            model is given instead; must not write into its argument.

    Raises:
        ModelError: If there is no such module, there is no tensor, or the hookpoint is a normalised
            one, which is computed inside its module.
    """
    path, side = parse_hookpoint(model, hookpoint)
    module = model.get_submodule(path)
    if side == "normalized":
        raise ModelError(
            f"hookpoint {hookpoint!r}: cannot be changed, it is computed inside the norm. Choose "
            f"{path!r} (after the learned scale) or '{path}.input'."
        )

    def replace_output(module: nn.Module, args: object, output: object) -> object:
        del module, args
        new = edit(_tensor_of(hookpoint, output))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    parameter = _first_parameter(module)

    def replace_input(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        del module
        new = edit(_tensor_of(hookpoint, args[0] if args else kwargs.get(parameter)))
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, parameter: new})

    if side == "output":
        handle = module.register_forward_hook(replace_output)
    else:
        handle = module.register_forward_pre_hook(replace_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def steered(
    model: nn.Module,
    hookpoint: str,
    vectors: Float[Tensor, "row d_in"],
    first: Bool[Tensor, "row position"] | None = None,
) -> Iterator[None]:
    """Add to each row of a batch a vector of its own, while ``model`` runs in the ``with`` block.

    Args:
        model: Any module.
        hookpoint: Counted from ``model``; see :func:`edited`.
        vectors: In units of what stands at the hookpoint; added in float32, and the sum is rounded
            to the type of what stands there. A row of zeros leaves its row as it is, to the bit.
        first: Positions of the first forward pass that are steered, padding on either side left
            out; null: all. Every later pass of the block continues the rows from a KV cache, so
            all of its positions are steered: a hook on the prompt alone would reach no token that
            is generated.

    Raises:
        ModelError: If there is no such module, or what stands there is not one vector per position
            of as many rows.
    """
    remaining = [first]
    side = parse_hookpoint(model, hookpoint).side

    def add(hidden: Tensor) -> Tensor:
        where = remaining.pop() if remaining else None
        _check_shape(f"hookpoint {hookpoint!r}: {side}", hidden, vectors, where)
        added = vectors.to(hidden.device)[:, None, :].float()
        if where is not None:
            added = added * where.to(hidden.device)[..., None]
        return (hidden.float() + added).to(hidden.dtype)

    with edited(model, hookpoint, add):
        yield


def parse_hookpoint(model: nn.Module, name: str) -> Hookpoint:
    """The module and the side that a name means in a model.

    Raises:
        ModelError: If there is no such module; names the nearest paths.
    """
    modules = {path for path, _ in model.named_modules() if path}
    found = split_hookpoint(modules, name)
    if found is not None:
        return found
    path, _, side = name.rpartition(".")
    suffix = f".{side}" if side in _SIDES else ""
    wanted = path if suffix else name
    nearest = difflib.get_close_matches(wanted, sorted(modules), n=5, cutoff=0.3)
    raise ModelError(
        f"hookpoint {name!r}: {type(model).__name__} has no module {wanted!r}. "
        f"Nearest: {', '.join(f'{path}{suffix}' for path in nearest) or 'none'}. "
        "Paths count from the base model."
    )


def split_hookpoint(paths: Iterable[str], name: str) -> Hookpoint | None:
    """The module and the side that a name means, among modules at these paths; null if none."""
    known = paths if isinstance(paths, set | frozenset | dict) else frozenset(paths)
    if name in known:
        return Hookpoint(name, "output")
    for side in _SIDES:
        path = name.removesuffix(f".{side}")
        if path != name and path in known:
            return Hookpoint(path, side)
    return None


def _first_parameter(module: nn.Module) -> str:
    """The name of a module's input: many are called with keywords alone."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def _tensor_of(name: str, value: object) -> Tensor:
    hidden = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(hidden, Tensor):
        raise ModelError(
            f"hookpoint {name!r}: there is a {type(hidden).__name__}, wanted a tensor (or a tuple "
            "that starts with one). Choose another hookpoint."
        )
    return hidden


def _norm_of(name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a norm does before its learned scale and bias, in float32."""
    kind = type(module).__name__
    # Some models call a class LayerNorm that takes no mean off, so the name alone does not do.
    is_layer, is_rms = isinstance(module, nn.LayerNorm), "rmsnorm" in kind.lower()
    eps_name = next((eps for eps in _EPSILONS if hasattr(module, eps)), None)
    if eps_name is None or not (is_layer or is_rms):
        raise ModelError(
            f"hookpoint {name!r}: the module is a {kind}, wanted an RMSNorm or torch's LayerNorm, "
            f"with one of the attributes {', '.join(_EPSILONS)}. Choose its input or its output."
        )
    declared: float | None = getattr(module, eps_name)

    def normalized(hidden: Tensor) -> Tensor:
        eps = torch.finfo(hidden.dtype).eps if declared is None else declared  # as in nn.RMSNorm
        x = hidden.float()
        if is_layer:
            x = x - x.mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)

    return normalized


def _check_shape(
    about: str,
    hidden: Tensor,
    vectors: Float[Tensor, "row d_in"],
    where: Bool[Tensor, "row position"] | None,
) -> None:
    n_rows, d_in = vectors.shape
    n_positions = hidden.shape[1] if where is None and hidden.ndim == 3 else None
    if where is not None:
        n_positions = where.shape[1]
    if hidden.shape != (n_rows, n_positions, d_in):
        raise ModelError(
            f"{about} of shape {tuple(hidden.shape)}, wanted ({n_rows}, "
            f"{n_positions or 'positions'}, {d_in}): a row per vector, and as wide. Choose a "
            "module that gives one vector per token, and one steering vector per row."
        )

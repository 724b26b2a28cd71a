"""Read the outputs of named modules, or change them, while a model runs."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from jaxtyping import Bool, Float
from torch import Tensor, nn

from autointerp_dagster.core.errors import ModelError


class _StopForwardError(Exception):
    """Ends a forward pass once every module asked for has run."""


@contextmanager
def captured_outputs(model: nn.Module, hookpoints: Iterable[str]) -> Iterator[Mapping[str, Tensor]]:
    """Capture what named modules return while ``model`` runs inside the ``with`` block.

    The forward pass ends as soon as every module has run, and with it the block: what stands after
    the call in the block is not run. Read the outputs after the block.

    Args:
        model: Any module; run it once in the block.
        hookpoints: Dotted paths relative to ``model``.

    Yields:
        Filled during the forward pass: a copy of each module's output in its first call (of the
        first item, where the output is a tuple). It is not changed by what the model does next.

    Raises:
        ModelError: If a hookpoint does not exist, does not run, or returns no tensor.
    """
    wanted = dict.fromkeys(hookpoints)
    outputs: dict[str, Tensor] = {}
    stop = _StopForwardError()
    with ExitStack() as hooks:
        for name in wanted:
            hook = _hook(name, outputs, n_wanted=len(wanted), stop=stop)
            hooks.callback(submodule(model, name).register_forward_hook(hook).remove)
        try:
            yield outputs
        except _StopForwardError as stopped:
            if stopped is not stop:
                raise
    missing = [name for name in wanted if name not in outputs]
    if missing:
        raise ModelError(
            f"hookpoints {missing}: no output, the modules did not run in this forward pass. "
            "Choose modules that every forward pass calls."
        )


@contextmanager
def edited_output(
    model: nn.Module, hookpoint: str, edit: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Replace what a named module returns, in every forward pass inside the ``with`` block.

    Args:
        model: Any module.
        hookpoint: Dotted path relative to ``model``.
        edit: From the module's output (the first item, where it is a tuple) to what the rest of the
            model is given instead; must not write into its argument.

    Raises:
        ModelError: If there is no such module, or it returns no tensor.
    """

    def replace(module: nn.Module, inputs: object, output: object) -> object:
        del module, inputs
        edited = edit(_tensor_of(hookpoint, output))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = submodule(model, hookpoint).register_forward_hook(replace)
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
        hookpoint: Dotted path relative to ``model``.
        vectors: In units of the hookpoint's output, on its device; added in float32, and the sum is
            rounded to the type of the output. A row of zeros leaves its row as it is, to the bit.
        first: Positions of the first forward pass that are steered, padding on either side left
            out; null: all. Every later pass of the block continues the rows from a KV cache, so
            all of its positions are steered: a hook on the prompt alone would reach no token that
            is generated.

    Raises:
        ModelError: If there is no such module, or its output is not one vector per position of as
            many rows.
    """
    remaining = [first]

    def add(hidden: Tensor) -> Tensor:
        where = remaining.pop() if remaining else None
        _check_shape(hookpoint, hidden, vectors, where)
        added = vectors[:, None, :].float()
        if where is not None:
            added = added * where[..., None]
        return (hidden.float() + added).to(hidden.dtype)

    with edited_output(model, hookpoint, add):
        yield


def submodule(model: nn.Module, hookpoint: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        ModelError: If there is none; names the nearest paths.
    """
    modules = dict(model.named_modules())
    if hookpoint in modules and hookpoint:
        return modules[hookpoint]
    nearest = difflib.get_close_matches(hookpoint, list(modules), n=5, cutoff=0.3)
    raise ModelError(
        f"hookpoint {hookpoint!r}: {type(model).__name__} has no module of this name. "
        f"Nearest: {', '.join(nearest) or 'none'}. Paths count from the base model."
    )


def _hook(
    name: str, outputs: dict[str, Tensor], n_wanted: int, stop: Exception
) -> Callable[[nn.Module, object, object], None]:
    def keep(module: nn.Module, inputs: object, output: object) -> None:
        del module, inputs
        if name in outputs:
            return
        outputs[name] = _tensor_of(name, output).detach().clone()
        if len(outputs) == n_wanted:
            raise stop

    return keep


def _tensor_of(name: str, output: object) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(
            f"hookpoint {name!r}: the module returns a {type(hidden).__name__}, wanted a "
            "tensor (or a tuple that starts with one). Choose another hookpoint."
        )
    return hidden


def _check_shape(
    hookpoint: str,
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
            f"hookpoint {hookpoint!r}: output of shape {tuple(hidden.shape)}, wanted ({n_rows}, "
            f"{n_positions or 'positions'}, {d_in}): a row per vector, and as wide. Choose a "
            "module that gives one vector per token, and one steering vector per row."
        )

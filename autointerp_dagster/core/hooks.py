"""Read the outputs of named modules from one forward pass that goes no further than needed."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

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
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise ModelError(
                f"hookpoint {name!r}: the module returns a {type(hidden).__name__}, wanted a "
                "tensor (or a tuple that starts with one). Choose another hookpoint."
            )
        outputs[name] = hidden.detach().clone()
        if len(outputs) == n_wanted:
            raise stop

    return keep

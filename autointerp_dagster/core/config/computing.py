"""How coders with a linear encoder compute."""

from typing import ClassVar, Literal

from autointerp_dagster.core.config.base import Parameters


class ComputingConfig(Parameters, frozen=True):
    """How a coder with a linear encoder computes."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"screen", "compiled"})

    precision: Literal["float32", "bfloat16"] = "float32"
    """On a GPU: of the encoder's product. bfloat16 is several times faster and rounds every
    pre-activation."""
    screen: Literal["auto", "bfloat16", "float32"] = "auto"
    """On a CPU: what all latents are scored in before the few that may fire are computed in
    float32, which decides. ``auto``: bfloat16 where the CPU multiplies it in hardware and it pays.
    ``float32`` suits a coder with a few huge dimensions. A GPU has ``precision`` instead.
    """
    compiled: bool = False
    """On a GPU: whether to encode with ``torch.compile``; on a CPU it changes nothing."""

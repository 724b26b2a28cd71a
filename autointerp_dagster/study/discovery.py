"""How a study with ``layers: discover`` looks for sparse coders."""

import re
from collections.abc import Collection
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BeforeValidator, Field, field_validator

from autointerp_dagster.core.config import CoderConfig, FileCoderConfig, Parameters

DISCOVER = "discover"
"""What a study's ``layers`` say to take every coder that turns up."""

Layers = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda layers: (layers,) if layers == DISCOVER else layers),
    Field(min_length=1),
]
"""A study's ``layers``; ``discover`` may be written without brackets."""

_CRON = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
"""Fields of a cron schedule, with their least and largest value."""


class NightlyConfig(Parameters, frozen=True):
    """The schedule ``<study>_nightly``, and what all that it launches at once may spend."""

    cron: str = "0 2 * * *"
    """When: minute, hour, day of the month, month, day of the week; numbers, ranges, steps."""
    timezone: str = "UTC"
    """Of the times in ``cron``, e.g. ``Europe/Berlin``."""
    usd: float | None = Field(default=None, ge=0)
    """Of one night; null: ``budget.usd``. Needs the prices of every remote model."""
    tokens: int | None = Field(default=None, ge=0)
    """Of one night, prompt and completion tokens together; null: ``budget.tokens``."""

    @field_validator("cron")
    @classmethod
    def _check_cron(cls, cron: str) -> str:
        fields = cron.split()
        if len(fields) != len(_CRON):
            raise ValueError("wanted five fields, e.g. '0 2 * * *': every day at two o'clock")
        for field, (name, least, largest) in zip(fields, _CRON, strict=True):
            for part in field.split(","):
                matched = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/[1-9]\d*)?", part)
                numbers = [] if matched is None else [int(n) for n in matched.groups() if n]
                if matched is None or not all(least <= n <= largest for n in numbers):
                    raise ValueError(
                        f"{name} {part!r}: wanted * or numbers from {least} to {largest}, e.g. "
                        f"'{least}-{least + 1}' or '*/2'"
                    )
        return cron

    @field_validator("timezone")
    @classmethod
    def _check_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError("no such timezone; wanted a name such as 'Europe/Berlin'") from error
        return name


class DiscoveryConfig(Parameters, frozen=True):
    """How often ``layers: discover`` looks, and when a file counts as whole."""

    every_s: int = Field(default=60, ge=1)
    """Seconds between two looks of the sensor ``<study>_new_coders``."""
    settle_s: float = Field(default=30.0, ge=0)
    """Seconds for which a coder's local files must not have changed before they are read."""
    nightly: NightlyConfig = NightlyConfig()
    """When the schedule ``<study>_nightly`` looks, and what it may spend."""


def check_layers(layers: Collection[str], coders: Collection[CoderConfig]) -> None:
    """Refuse layers to be discovered beside others, or where there is nowhere to look.

    Raises:
        ValueError: Says which, and what to do.
    """
    if DISCOVER not in layers:
        return
    if len(layers) > 1:
        raise ValueError(f"layers: {DISCOVER} stands alone, without other layers beside it.")
    if not any(isinstance(config, FileCoderConfig) for config in coders):
        raise ValueError(
            f"layers: {DISCOVER} looks among the files of coders, and none has any. Give one a "
            "path (a folder) or a repo."
        )

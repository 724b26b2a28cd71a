"""What may be spent on remote language models."""

from pydantic import Field

from autointerp_dagster.core.config import Parameters


class BudgetConfig(Parameters, frozen=True):
    """What may be spent on remote language models; null: no limit.

    Checked before each call, which is not made if it could exceed the limit.
    """

    usd: float | None = Field(default=None, ge=0)
    """Of one run. Needs the prices of every remote model."""
    tokens: int | None = Field(default=None, ge=0)
    """Of one run, prompt and completion tokens together."""
    study_usd: float | None = Field(default=None, ge=0)
    """Of all runs of the study together."""
    study_tokens: int | None = Field(default=None, ge=0)
    """Of all runs of the study together."""
    hours: float | None = Field(default=None, gt=0)
    """How long one asset may go on asking; then it stops cleanly, as for a budget."""

"""What a result may look like before whatever is made from it is refused."""

from pydantic import Field

from autointerp_dagster.core.config.base import Parameters


class ChecksConfig(Parameters, frozen=True):
    """Bounds of the checks; null switches a check off. They change no result, they block a run.

    A share blocks only if its whole interval lies beyond the bound: of 95 %, for all cells and
    layers of the study together. It is taken of every cell, every layer and all of a run, by
    explainer. That splits are disjoint and tables are as declared is always checked.
    """

    failed_rate: float | None = Field(default=0.2, ge=0, lt=1)
    """Most of what was asked that may be without a usable answer, of an explanations or score
    stage; what a budget left unasked does not count."""
    share_scored: float | None = Field(default=0.5, gt=0, le=1)
    """Least share of a scorer's latents that must have its score; dead, rare and dense ones do not
    count."""
    judge_floor: float | None = Field(default=0.15, gt=0, le=0.5)
    """How far from .5 the balanced accuracy of detection and fuzzing may be under another latent's
    explanation."""
    fvu: float | None = Field(default=1.0, gt=0)
    """Most of a hookpoint's variance that an autoencoder from files may leave unexplained; 1 is
    what the mean alone leaves."""
    l0: float | None = Field(default=2.0, gt=1)
    """Factor by which the number of latents that fire on a token may differ from what the files of
    a coder say, in either direction; of TopK it may only not be above k. A coder whose files say
    nothing is not checked."""

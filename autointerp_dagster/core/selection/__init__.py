"""Choosing between several explanations of a latent on the windows of the ``select`` split."""

from autointerp_dagster.core.selection.choosing import VERSION, SelectionModels, choose

__all__ = ["VERSION", "SelectionModels", "choose"]

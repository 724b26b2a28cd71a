"""``autointerp``: the pipeline without a browser."""

from autointerp_dagster.cli.main import app

__all__ = ["app"]

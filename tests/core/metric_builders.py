"""Small tables for tests of metrics; a test states only what matters to it."""

from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from autointerp_dagster.core.schemas import (
    EXPLANATIONS,
    LATENT_METRICS,
    LATENTS,
    SELECTION,
    VERDICTS,
    Table,
)
from autointerp_dagster.core.types import LayerKey

LAYER = LayerKey("sae", "layers.1")


def table_of(table: Table, rows: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> Any:
    filled = [dict.fromkeys(table.columns) | defaults | row for row in rows]
    return table.conform(pl.DataFrame(filled, schema=dict(table.columns)))


def make_selection(latents: Iterable[int], floors: Sequence[int] = ()) -> pl.DataFrame:
    rows = [{"latent": latent, "is_floor": latent in floors} for latent in latents]
    return table_of(SELECTION, rows, _here())


def make_explanations(
    latents: Iterable[int], failed: Sequence[int] = (), explainers: Sequence[str] = ("default",)
) -> pl.DataFrame:
    rows = [
        {
            "latent": latent,
            "explainer": explainer,
            "text": None if latent in failed else "words",
            "selected": latent not in failed,
            "status": "failed" if latent in failed else "ok",
            "reason": "unparsable" if latent in failed else None,
        }
        for latent in latents
        for explainer in explainers
    ]
    return table_of(EXPLANATIONS, rows, {**_here(), "candidate": 0})


def make_verdict(latent: int, window: int, is_activating: bool, **columns: Any) -> dict[str, Any]:
    return {"latent": latent, "window_id": window, "is_activating": is_activating, **columns}


def make_verdicts(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    defaults = {"explainer": "default", "subject": "own", "variant": "all", "status": "ok"}
    return table_of(VERDICTS, rows, {**_here(), **defaults})


def answers(
    latent: int, activating: str, silent: str, *, per_prompt: int = 1, **columns: Any
) -> list[dict[str, Any]]:
    """Verdicts written as one sign per window: 1 or 0 (the prediction), x (failed)."""
    rows = []
    signs = [(True, sign) for sign in activating] + [(False, sign) for sign in silent]
    for window, (is_activating, sign) in enumerate(signs):
        answer = {
            "prediction": None if sign == "x" else sign == "1",
            "status": "failed" if sign == "x" else "ok",
            "reason": "unparsable" if sign == "x" else None,
            "call_id": f"{latent}-{columns}-{window // per_prompt}",
        }
        rows.append(make_verdict(latent, window, is_activating, **answer | columns))
    return rows


def make_latents(statuses: Sequence[str]) -> pl.DataFrame:
    rows = [{"latent": index, "status": status} for index, status in enumerate(statuses)]
    return table_of(LATENTS, rows, _here())


def make_metric(latent: int, value: float | None, **columns: Any) -> dict[str, Any]:
    status = "ok" if value is not None else "failed"
    return {"latent": latent, "value": value, "status": status, **columns}


def make_metrics(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    defaults = {
        "explainer": "default",
        "scorer": "detection",
        "subject": "own",
        "variant": "all",
        "metric": "balanced_accuracy",
        "n": 100,
        "n_failed": 0,
    }
    return table_of(LATENT_METRICS, rows, {**_here(), **defaults})


def _here() -> dict[str, str]:
    return {"coder": LAYER.coder, "hookpoint": LAYER.hookpoint}

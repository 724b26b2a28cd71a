"""The studies that are rehearsed with."""

from pathlib import Path
from typing import Any

import yaml

from tests.e2e.planted import write_study

IN_FLIGHT = 4
LATENCY_S = 0.02
"""Of the fake model's answers: enough for kills to fall between them."""


def planted_study(world: Path, base_url: str, folder: Path, root: str, **over: Any) -> Path:
    """Every stage of the demo study, on the planted world; most ask the fake server."""
    llm = {"base_url": base_url, "model": "fake", "max_in_flight": IN_FLIGHT}
    embedder = {"source": "embedded:all-minilm-l6-v2", "query_prefix": "", "device": "cpu"}
    overrides: dict[str, Any] = {
        "range_size": 32,
        "floors": {"donor_block": 32},
        "latents": [0, 1, 7, 9, 14],
        "models": {
            "explainer": llm, "judge": llm, "base_lm": {**llm, "model": "fake-base"},
            "embedder": embedder,
        },
        "explainers": {
            "top_tokens": {"kind": "top_tokens"},
            "default": {"kind": "default", "n_examples": 12},
            "output": {"kind": "output", "n_samples": 1},
        },
        "sampling": {
            "n_test": 20, "n_quantiles": 4,
            "negative_kinds": ["random", "neighbour", "similar", "same_token"],
        },
        "window_embeddings": {"max_windows": 400},
        "interventions": {"kl": [0.05], "n_prompts": 4, "n_for_explainer": 2, "n_tokens": 4},
        "scorers": {
            "detection": {"explainers": ["top_tokens", "default"]},
            "fuzzing": {"variants": ["active"], "explainers": ["default"]},
            "embedding": {"explainers": ["default"]},
            "surprisal": {"n_examples": 3, "explainers": ["default"]},
            "simulation": {"n_examples": 5, "explainers": ["default"]},
            "intruder": {"n_trials": 6},
            "example_embedding": {"n_rounds": 4},
            "intervention": {"explainers": ["output"]},
        },
        "metrics": {"n_bootstrap": 100},
        "store": root,
        **over,
    }  # fmt: skip
    return write_study(folder, world, base_url, "planted", **overrides)


def extend_study(base: Path, folder: Path, root: str) -> Path:
    """A given study with another store."""
    path = folder / "studies" / base.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"extends": str(base), "store": root}))
    return path

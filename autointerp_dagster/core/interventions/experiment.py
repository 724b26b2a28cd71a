"""The experiment on a group of latents: strengths, then what is written and promoted at them.

1. Prompts on whose last token the latent no longer fires are dropped.
2. For each target, the strength is searched on the scoring prompts.
3. At that strength each scoring prompt is continued, clean and steered, and the tokens whose
   probability rises most are kept of each of the explainer's prompts.

Clean and steered continuations of a prompt are drawn with the same random numbers, at every target:
they differ only where the distributions do, so less of their difference is chance.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import polars as pl
from jaxtyping import Float32, Float64, Int64

from autointerp_dagster.core.config import InterventionsConfig
from autointerp_dagster.core.interventions.strength import (
    Divergence,
    Strength,
    find_strengths,
)
from autointerp_dagster.core.interventions.texts import (
    continuation_text,
    promoted_texts,
    prompt_text,
)
from autointerp_dagster.core.rng import latent_rng
from autointerp_dagster.core.schemas import (
    INTERVENTION_PROMPTS,
    INTERVENTIONS,
    InterventionStatus,
)
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LayerKey

MIN_SCORING = 2
"""Prompts for scoring that a latent needs: fewer have no standard error."""
MIN_FOR_EXPLAINER = 1
_SPARE_TOKENS = 4
"""Tokens asked for beyond ``n_promoted``, as special ones are no text."""

Rows = Int64[np.ndarray, " row"]
"""Places of prompts in their group."""


class Rises(NamedTuple):
    """The next tokens whose probability steering raised most."""

    tokens: Int64[np.ndarray, "row rank"]
    rises: Float64[np.ndarray, "row rank"]
    """Steered minus clean probability, descending."""


@runtime_checkable
class SteeredPrompts(Protocol):
    """The prompts of a group of latents in a model that is steered from the last token on.

    A strength belongs to a row: it is multiplied by the direction of the row's latent and added at
    the prompt's last token and at every generated one. 0 is the undisturbed model.
    """

    def activations(self) -> Float32[np.ndarray, " prompt"]:
        """Of each prompt's latent on its last token, computed anew; 0 where it does not fire."""
        ...

    def divergence(self, rows: Rows, strengths: Float64[np.ndarray, " row"]) -> Divergence:
        """Of the next token's distribution, for each of ``rows``."""
        ...

    def rises(self, rows: Rows, strengths: Float64[np.ndarray, " row"], n: int) -> Rises:
        """The ``n`` next tokens whose probability rises most, for each of ``rows``."""
        ...

    def continuations(
        self,
        rows: Rows,
        strengths: Float64[np.ndarray, " row"],
        draws: Float64[np.ndarray, "row n_tokens"],
        temperature: float,
    ) -> Int64[np.ndarray, "row n_tokens"]:
        """Tokens after each of ``rows``, one per uniform number in [0, 1) of ``draws``."""
        ...


class Outcome(NamedTuple):
    """What is stored of some latents."""

    interventions: pl.DataFrame
    """Columns of ``schemas.INTERVENTIONS``, but for coder and hookpoint."""
    prompts: pl.DataFrame
    """Columns of ``schemas.INTERVENTION_PROMPTS``, likewise."""

    @classmethod
    def concat(cls, outcomes: Sequence["Outcome"], layer: LayerKey) -> "Outcome":
        """All rows as the two declared tables."""
        bare = [t.empty().drop("coder", "hookpoint") for t in (INTERVENTIONS, INTERVENTION_PROMPTS)]
        parts = [Outcome(*bare), *outcomes]
        return cls(
            INTERVENTIONS.conform(pl.concat([part.interventions for part in parts]), layer),
            INTERVENTION_PROMPTS.conform(pl.concat([part.prompts for part in parts]), layer),
        )


@dataclass(frozen=True, slots=True)
class Writer:
    """From tokens to text."""

    detokenizer: Detokenizer
    ends: frozenset[int]
    """Tokens that end a text."""


def has_enough(is_for_explainer: np.ndarray) -> bool:
    """Whether so many prompts of the two kinds are enough to try."""
    n_shown = int(is_for_explainer.sum())
    return n_shown >= MIN_FOR_EXPLAINER and len(is_for_explainer) - n_shown >= MIN_SCORING


def untried(
    latent: int, status: InterventionStatus, config: InterventionsConfig, n_prompts: int = 0,
    n_dropped: int = 0,
) -> Outcome:  # fmt: skip
    """The rows of a latent along which nothing was steered, one per target."""
    rows = [
        _row(latent, target, Strength(None, None, None, 0, False), status, n_prompts, n_dropped)
        for target in config.kl
    ]
    return Outcome(_frame(INTERVENTIONS.columns, rows), _frame(INTERVENTION_PROMPTS.columns, []))


def intervene(
    prompts: pl.DataFrame,
    tokens: Sequence[np.ndarray],
    model: SteeredPrompts,
    layer: LayerKey,
    config: InterventionsConfig,
    writer: Writer,
) -> dict[int, Outcome]:
    """Steer along every latent of a group, at every target.

    Args:
        prompts: Rows of :func:`prompts.prompts_of`, all of each latent's.
        tokens: Of each prompt.
        model: Holds the same prompts in the same order.
        layer: Part of the address of a draw.
        config: Targets and everything else.
        writer: For what is stored as text.

    Returns:
        By latent. The outcome of one does not depend on which others are in the group.
    """
    fires = model.activations() > 0
    experiment = _Experiment(prompts, tokens, model, layer, config, writer, fires)
    return experiment.outcomes()


class _Experiment:
    """One call of :func:`intervene`."""

    def __init__(
        self,
        prompts: pl.DataFrame,
        tokens: Sequence[np.ndarray],
        model: SteeredPrompts,
        layer: LayerKey,
        config: InterventionsConfig,
        writer: Writer,
        fires: np.ndarray,
    ) -> None:
        self.tokens, self.model, self.layer = tokens, model, layer
        self.config, self.writer = config, writer
        self.prompts = list(prompts.iter_rows(named=True))
        self.latent = prompts["latent"].to_numpy().astype(np.int64)
        self.is_shown = prompts["is_for_explainer"].to_numpy()
        self.fires = fires
        self.found: dict[int, list[Outcome]] = {}
        self.tried: list[int] = []
        self.clean: dict[int, np.ndarray] = {}

    def outcomes(self) -> dict[int, Outcome]:
        for latent in np.unique(self.latent).tolist():
            mine = self.latent == latent
            kept = mine & self.fires
            if has_enough(self.is_shown[kept]):
                self.found[latent] = []
                self.tried.append(latent)
            else:
                n_kept, n_dropped = int(kept.sum()), int((mine & ~self.fires).sum())
                self.found[latent] = [untried(latent, "too_few", self.config, n_kept, n_dropped)]
        if self.tried:
            self.clean = self._continued(self._rows(for_explainer=False), 0.0)
            for target in self.config.kl:
                self._try(target)
        return {
            latent: Outcome(*(pl.concat(tables) for tables in zip(*parts, strict=True)))
            for latent, parts in self.found.items()
        }

    def _try(self, target: float) -> None:
        """Search the strengths of a target, and look what happens at them."""
        config = self.config
        strengths = find_strengths(
            self._divergence_of, len(self.tried), target, config.tolerance, config.max_steps
        )
        of = dict(zip(self.tried, strengths, strict=True))
        steerable = {i: s.strength for i, s in of.items() if s.strength is not None}
        texts = self._texts(steerable, target)
        for latent, strength in of.items():
            mine = self.latent == latent
            kept = mine & self.fires
            status: InterventionStatus = "ok" if strength.is_on_target else "off_target"
            n_kept, n_dropped = int(kept.sum()), int((mine & ~self.fires).sum())
            row = _row(latent, target, strength, status, n_kept, n_dropped)
            self.found[latent].append(
                Outcome(
                    _frame(INTERVENTIONS.columns, [row]),
                    _frame(INTERVENTION_PROMPTS.columns, texts.get(latent, [])),
                )
            )

    def _divergence_of(
        self, items: Int64[np.ndarray, " item"], strengths: Float64[np.ndarray, " item"]
    ) -> Divergence:
        """Means over each latent's scoring prompts."""
        latents = [self.tried[item] for item in items]
        rows = self._rows(latents, for_explainer=False)
        place = np.zeros(int(self.latent.max()) + 1, dtype=np.int64)
        place[latents] = np.arange(len(latents))
        item = place[self.latent[rows]]
        found = self.model.divergence(rows, strengths[item])
        n_rows = np.bincount(item, minlength=len(latents))
        return Divergence(
            *(np.bincount(item, weights=kl, minlength=len(latents)) / n_rows for kl in found)
        )

    def _rows(self, latents: Sequence[int] | None = None, *, for_explainer: bool) -> np.ndarray:
        """Kept prompts of one kind, ascending, of those latents that are tried by default."""
        wanted = self.tried if latents is None else latents
        kept = self.fires & (self.is_shown == for_explainer) & np.isin(self.latent, wanted)
        return np.flatnonzero(kept).astype(np.int64)

    def _texts(
        self, strength_of: Mapping[int, float], target: float
    ) -> dict[int, list[dict[str, Any]]]:
        """Rows of the prompts' table, by latent."""
        latents, rows = list(strength_of), []
        scoring = self._rows(latents, for_explainer=False)
        steered = self._continued(scoring, [strength_of[i] for i in self.latent[scoring].tolist()])
        for row in scoring.tolist():
            texts = {
                "clean": self._written(row, self.clean[row]),
                "steered": self._written(row, steered[row]),
                "promoted": None,
                "rises": None,
            }
            rows.append(self._prompt(row, target) | texts)
        rows.extend(self._promoted(strength_of, target))
        by_latent: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            by_latent.setdefault(row["latent"], []).append(row)
        return by_latent

    def _promoted(
        self, strength_of: Mapping[int, float], target: float
    ) -> Iterator[dict[str, Any]]:
        shown = self._rows(list(strength_of), for_explainer=True)
        if not len(shown):
            return
        strengths = np.array([strength_of[i] for i in self.latent[shown].tolist()])
        n = self.config.n_promoted
        found = self.model.rises(shown, strengths, n + _SPARE_TOKENS)
        for row, tokens, rises in zip(
            shown.tolist(), *(part.tolist() for part in found), strict=True
        ):
            texts, kept = promoted_texts(
                self.writer.detokenizer, self.tokens[row], tokens, rises, n
            )
            promoted = {"clean": None, "steered": None, "promoted": texts, "rises": kept}
            yield self._prompt(row, target) | promoted

    def _continued(
        self, rows: np.ndarray, strengths: Sequence[float] | float
    ) -> dict[int, np.ndarray]:
        """Tokens after each row; what is drawn has the address (latent, prompt)."""
        if not len(rows):
            return {}
        draws = [self._draws(row) for row in rows.tolist()]
        each = np.broadcast_to(np.asarray(strengths, dtype=np.float64), rows.shape).copy()
        found = self.model.continuations(rows, each, np.stack(draws), self.config.temperature)
        return dict(zip(rows.tolist(), found, strict=True))

    def _draws(self, row: int) -> np.ndarray:
        purpose = f"continuation {self.prompts[row]['window_id']}"
        rng = latent_rng(self.config.seed, self.layer, int(self.latent[row]), purpose)
        return rng.random(self.config.n_tokens)

    def _written(self, row: int, continuation: np.ndarray) -> str:
        return continuation_text(
            self.writer.detokenizer, self.tokens[row], continuation, self.writer.ends
        )

    def _prompt(self, row: int, target: float) -> dict[str, Any]:
        prompt = self.prompts[row]
        names = ("latent", "window_id", "is_for_explainer", "quintile", "activation")
        text = prompt_text(self.writer.detokenizer, self.tokens[row])
        return {name: prompt[name] for name in names} | {"kl_target": target, "prompt": text}


def _row(
    latent: int,
    target: float,
    strength: Strength,
    status: InterventionStatus,
    n_prompts: int,
    n_dropped: int,
) -> dict[str, Any]:
    return {
        "latent": latent,
        "kl_target": target,
        "strength": strength.strength,
        "kl": strength.kl,
        "reverse_kl": strength.reverse_kl,
        "n_steps": strength.n_steps,
        "n_prompts": n_prompts,
        "n_dropped": n_dropped,
        "status": status,
    }


def _frame(columns: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    schema = {name: kind for name, kind in columns.items() if name not in ("coder", "hookpoint")}
    return pl.DataFrame(list(rows), schema=schema, orient="row")

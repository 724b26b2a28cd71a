"""Marked windows: true marks by the rule of ``core.highlight``, and marks copied from another."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from autointerp_dagster.core import highlight
from autointerp_dagster.core.highlight import VisibleTokens
from autointerp_dagster.core.latent_records import Window
from autointerp_dagster.core.tokens import Detokenizer


class MarkedWindow(NamedTuple):
    """A window with its true marks; a silent one has none."""

    window: Window
    visible: VisibleTokens
    marks: Bool[np.ndarray, " position"]

    @property
    def text(self) -> str:
        """As it is shown: escaped, its marks around what fires."""
        return highlight.mark_text(self.visible.pieces, self.marks)

    def text_marked_as(self, marks: Bool[np.ndarray, " _"]) -> str:
        """As it is shown with the marks of another window, see :func:`copied_marks`."""
        pieces = self.visible.pieces
        return highlight.mark_text(pieces, copied_marks(marks, len(pieces)))


def mark_truly(window: Window, detokenizer: Detokenizer) -> MarkedWindow:
    """A window with marks where its latent fires at 0.3 of the window's maximum or more."""
    visible = highlight.visible_tokens(detokenizer.pieces(window.tokens), window.activations)
    return MarkedWindow(window, visible, highlight.marks_of(visible.activations))


def copied_marks(marks: Bool[np.ndarray, " _"], n_positions: int) -> Bool[np.ndarray, " position"]:
    """The marks of one window put on another: same positions, same run lengths, same number.

    Where the other window is shorter the pattern moves left as far as it must and can; marks that
    still stand beyond the end take the last free positions. A window with fewer positions than
    there are marks is marked all over.

    Args:
        marks: Of the window copied from.
        n_positions: Visible tokens of the window to be marked.
    """
    places = np.flatnonzero(marks)
    if places.size == 0 or places.size >= n_positions:
        return np.full(n_positions, places.size > 0)
    places = places - min(max(int(places[-1]) - (n_positions - 1), 0), int(places[0]))
    copied = np.zeros(n_positions, dtype=np.bool_)
    copied[places[places < n_positions]] = True
    n_lost = int((places >= n_positions).sum())
    if n_lost:
        copied[np.flatnonzero(~copied)[-n_lost:]] = True
    return copied

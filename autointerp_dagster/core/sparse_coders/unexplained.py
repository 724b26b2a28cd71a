"""How much of the vectors at a hookpoint a sparse autoencoder does not rebuild."""

from jaxtyping import Float
from torch import Tensor


class Unexplained:
    """Fraction of variance unexplained, of vectors that come in parts; added up in float64."""

    def __init__(self) -> None:
        self._n_vectors = 0
        self._error = self._squares = 0.0
        self._sum: Tensor | None = None

    def add(self, x: Float[Tensor, "token d_in"], rebuilt: Float[Tensor, "token d_in"]) -> None:
        """Takes in what a coder was given and what it made of it; both on one device."""
        exact = x.double()
        self._n_vectors += len(x)
        self._error += float((exact - rebuilt.double()).square().sum())
        self._squares += float(exact.square().sum())
        total = exact.sum(dim=0).cpu()
        self._sum = total if self._sum is None else self._sum + total

    @property
    def fraction(self) -> float | None:
        """``sum |x - rebuilt|^2 / sum |x - mean x|^2``, >= 0; null where the vectors do not vary.

        0 is perfect, 1 what the mean vector alone would leave. Above 1 the coder makes it worse.
        """
        if self._sum is None:
            return None
        variance = self._squares - float(self._sum.square().sum()) / self._n_vectors
        is_constant = variance <= 1e-12 * self._squares
        return None if is_constant else self._error / variance

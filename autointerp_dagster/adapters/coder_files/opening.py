"""Coders with their place and the name of their content, checked before they are used."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autointerp_dagster.adapters.coder_files.finding import (
    Found,
    ModelType,
    find_coder,
    hookpoints_of,
)
from autointerp_dagster.adapters.coder_files.weights import Weights, read_weights, weights_digest
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.sparse_coders import (
    Computing,
    GroupMax,
    LinearCoder,
    PlacedCoder,
    SparseCoder,
    TopK,
)
from autointerp_dagster.core.types import LayerKey

_NOT_TOLD = "the files do not say where it reads: taken as the study says"

_digests: dict[tuple[Any, ...], str] = {}
"""Identities that this process has computed, by file, size, time, and what else decides."""


@dataclass(frozen=True, slots=True)
class LoadedCoder:
    """A coder at its place, with the name of its content."""

    placed: PlacedCoder
    identity: str
    """Hash over the tensors, what decides how to encode, and the place; not over paths, so a copy
    is the same coder."""
    format: str
    """Of its files."""
    about: str
    """What was found there, for people."""
    expected_l0: float | None = None
    """Latents that fire on a token, on average, as published, or as its activation bounds them."""
    notes: tuple[str, ...] = ()
    """Warnings for whoever uses it."""

    @property
    def record(self) -> dict[str, object]:
        """What was found, to be recorded with what the coder gave."""
        return {
            "about": self.about,
            "reads": self.reads,
            "writes": self.writes,
            "expected_l0": self.expected_l0,
            "notes": list(self.notes),
        }

    @property
    def coder(self) -> SparseCoder:
        """The coder itself; its tensors are on the CPU."""
        return self.placed.coder

    @property
    def reads(self) -> str:
        """Hookpoint that is encoded."""
        return self.placed.reads

    @property
    def writes(self) -> str:
        """Hookpoint that decoder rows are added to."""
        return self.placed.writes


def open_coder(
    config: FileCoderConfig, hookpoint: str, model_type: ModelType = None
) -> LoadedCoder:
    """Load and check the coder of one hookpoint; its tensors are on the CPU.

    Args:
        config: Where the coders are.
        hookpoint: What a study's layer says: where the coder reads or writes, or its folder.
        model_type: For sites of TransformerLens in the files or the study.

    Raises:
        CoderError: If there is no such coder or more than one, a file is missing or unreadable, the
            coder is of a kind that is not supported, or a tensor is missing, unknown, of the wrong
            shape or not finite.
        ModelError: If its files name a place that the subject model's family does not have.
    """
    found = find_coder(config, hookpoint, model_type)
    weights = _weights(found)
    coder = build_coder(found, config, weights)
    bound = coder.activation.k if isinstance(coder.activation, TopK | GroupMax) else None
    is_told = found.description.reads is not None or config.reads is not None
    return LoadedCoder(
        PlacedCoder(coder, *_place(found)),
        _identity(found, config, weights),
        found.format.name,
        _about(found, coder),
        found.description.expected_l0 or bound,
        (*found.description.notes, *(() if is_told else (_NOT_TOLD,))),
    )


def coder_identity(config: FileCoderConfig, hookpoint: str, model_type: ModelType = None) -> str:
    """The identity that :func:`open_coder` gives, without keeping the coder.

    Reads the files once per process, and again after one has changed.

    Raises:
        CoderError: If a file is missing or unreadable; the coder is not checked further.
        ModelError: If its files name a place that the subject model's family does not have.
    """
    return _identity(find_coder(config, hookpoint, model_type), config)


def published_l0(
    config: FileCoderConfig, hookpoint: str, model_type: ModelType = None
) -> float | None:
    """Latents that fire on a token, on average, as names and settings say; reads no tensor.

    It is no part of a coder's identity: the coder is the same whatever is said of it.

    Raises:
        CoderError: If there is no such coder, or a file of settings is missing or unreadable.
        ModelError: If its files name a place that the subject model's family does not have.
    """
    return find_coder(config, hookpoint, model_type).description.expected_l0


def discover_hookpoints(config: FileCoderConfig, model_type: ModelType = None) -> list[str]:
    """What a study may write to ask for the coders that lie there, in natural order.

    Raises:
        CoderError: If the folder or repository does not exist or holds none.
        ModelError: If the files name a place that the subject model's family does not have.
    """
    return hookpoints_of(config, model_type)


WidthOf = Callable[[str], int | None]
"""Width of the vectors at a hookpoint; null: not known, so nothing is refused."""


def check_fits(
    loaded: LoadedCoder,
    subject_model: SubjectModel,
    layer: LayerKey,
    max_num_latents: int | None = None,
    width_of: WidthOf | None = None,
) -> None:
    """Refuse a coder that cannot be run at its place or is wider than the study's grid.

    Args:
        loaded: The coder of ``layer``.
        subject_model: Runs one token up to the hookpoints.
        layer: For the message.
        max_num_latents: Latents that the study's ranges cover; null: any number.
        width_of: As in :func:`check_width`.

    Raises:
        CoderError: If its widths are not the hookpoints', or it has too many latents.
        ModelError: If the subject model has no such hookpoint.
    """
    check_width(loaded.placed, subject_model, layer, width_of)
    num_latents = loaded.coder.num_latents
    if max_num_latents is not None and num_latents > max_num_latents:
        raise CoderError(
            f"{layer}: the coder has {num_latents} latents, the study's ranges cover "
            f"{max_num_latents}. Raise max_num_latents in the study."
        )


def check_width(
    placed: PlacedCoder,
    subject_model: SubjectModel,
    layer: LayerKey,
    width_of: WidthOf | None = None,
) -> None:
    """Refuse a coder that was trained on vectors of another width, going in or coming out.

    Args:
        placed: The coder.
        subject_model: Whose vectors it reads.
        layer: For the message.
        width_of: How widths are found; null: by running the model.

    Raises:
        CoderError: If the widths differ.
        ModelError: If the subject model has no such hookpoint.
    """
    coder, reads, writes = placed
    sides = {"d_in": (coder.d_in, reads), "d_out": (coder.d_out, writes)}
    width_of = width_of or subject_model.width_of
    widths = {hookpoint: width_of(hookpoint) for hookpoint in dict.fromkeys((reads, writes))}
    for name, (size, hookpoint) in sides.items():
        width = widths[hookpoint]
        if width not in (None, size):
            raise CoderError(
                f"{layer}: the coder's {name} is {size}, the vectors of "
                f"{subject_model.config.source} at {hookpoint!r} have width {width}. "
                "Choose the coder's own model, or another hookpoint."
            )


def build_coder(
    found: Found, config: FileCoderConfig, weights: Weights | None = None
) -> LinearCoder:
    """The coder, from its checked tensors; ``weights`` if they are read already.

    Raises:
        CoderError: If its weights are missing, unreadable, or not as they must be.
    """
    computing = Computing(
        screen=config.screen, compiled=config.compiled, precision=config.precision
    )
    try:
        coder = found.description.build(_weights(found) if weights is None else weights)
    except ValueError as error:
        shown = found.files.shown(found.unit.weights)
        raise CoderError(f"{shown}: {error} In the study, name another checkpoint.") from error
    return replace(coder, computing=computing)


def _weights(found: Found) -> Weights:
    name = found.unit.weights
    return read_weights(found.files.fetch(name), found.files.shown(name))


def _place(found: Found) -> tuple[str, str]:
    assert found.reads is not None  # a hookpoint was asked for
    return found.reads, found.writes or found.reads


def _about(found: Found, coder: LinearCoder) -> str:
    is_transcoder = found.description.is_transcoder
    kind = "transcoder" if is_transcoder else "autoencoder"
    reads, writes = _place(found)
    where = f"{reads} to {writes}" if is_transcoder else reads
    seen = " with ".join(filter(None, (found.unit.config, found.unit.weights)))
    return (
        f"{found.format.name}: {type(coder.activation).__name__} {kind} of {coder.num_latents} "
        f"latents, {where} ({seen} in {found.files.label})"
    )


def _identity(found: Found, config: FileCoderConfig, weights: Weights | None = None) -> str:
    """Of a file that was hashed before and has not changed, without reading it.

    Args:
        found: The coder's files.
        config: For what else is part of the identity.
        weights: What the file holds, if it is read already.
    """
    about: dict[str, Any] = {
        "format": found.format.name,
        "settings": dict(found.description.settings),
        "precision": config.precision,
        "place": _place(found),
    }
    file = found.files.fetch(found.unit.weights)
    key = (file, _stamp(file), _frozen(about))
    if key not in _digests:
        read = _weights(found) if weights is None else weights
        _digests[key] = weights_digest(read, about)
    return _digests[key]


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and time; a missing file is noticed when it is read."""
    if not file.is_file():
        return None
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _frozen(value: object) -> Any:
    """The same as nested tuples, which can be a cache's key."""
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value

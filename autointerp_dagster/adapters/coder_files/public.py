"""The loader for notebooks and scripts: a coder from anywhere, without a study."""

from pathlib import Path
from typing import Literal

from autointerp_dagster.adapters.coder_files.finding import find_coder
from autointerp_dagster.adapters.coder_files.opening import build_coder
from autointerp_dagster.core.config import CoderFormat, FileCoderConfig
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.sparse_coders import SparseCoder


def load_sparse_coder(
    source: str | Path,
    hookpoint: str | None = None,
    *,
    format: CoderFormat = "auto",
    revision: str | None = None,
    select: str | None = None,
    l0: float | None = None,
    model_type: str | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> SparseCoder:
    """A sparse coder from a local folder or file, or from a repository of the Hugging Face Hub.

    ``encode(x)`` gives what fires on each row of ``x`` ``[n, d_in]``, ``encode_dense(x)`` all
    activations ``[n, num_latents]`` the plain way. Its tensors are on the CPU; see ``to``.

    Args:
        source: What exists as a path is one; anything else of the form ``owner/name`` is a
            repository, of which only the files needed are fetched (``HF_HUB_OFFLINE=1``: taken from
            the cache).
        hookpoint: Where it reads or writes, or its folder's path; null: the only one there.
        format: See ``FileCoderConfig``; ``auto`` tells by the names of the files.
        revision: Commit, tag or branch of a repository.
        select: Unix pattern of folders in the coder's path, where several lie at one hookpoint.
        l0: Where several lie at one hookpoint: the one whose published average L0 is nearest.
        model_type: Of the subject model, e.g. ``gemma2``: with it ``hookpoint`` may be one of its
            modules although the files have TransformerLens names. Null: names are as in the files.
        precision: Of the product, on a GPU.

    Raises:
        CoderError: If there is no such coder or more than one (all are listed), or it is of a kind
            that is not supported, or its files are missing, damaged or do not fit each other.
        ModelError: If its files name a place that models of ``model_type`` do not have.
    """
    path = Path(source).expanduser()
    is_repo = not path.exists() and len(path.parts) == 2 and str(source)[0] not in "./~"
    if not is_repo and revision is not None:
        raise CoderError(
            f"coders {source}: revision {revision!r}, but this is a path, which has none. Leave it "
            "out, or give the name of a repository."
        )
    config = FileCoderConfig(
        path=None if is_repo else path,
        repo=str(source) if is_repo else None,
        revision=revision,
        format=format,
        select=select,
        l0=l0,
        precision=precision,
    )
    asked = None if model_type is None else (lambda: model_type)
    return build_coder(find_coder(config, hookpoint, asked), config)

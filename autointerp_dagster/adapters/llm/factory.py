"""From a study's description of a language model to the model."""

from pathlib import Path

from upath import UPath

from autointerp_dagster.adapters.llm.backend import Backend
from autointerp_dagster.adapters.llm.client import JournaledLLM
from autointerp_dagster.adapters.llm.journal import Journal
from autointerp_dagster.adapters.llm.segments import is_local
from autointerp_dagster.core.config.models import LLMConfig, LocalLLMConfig
from autointerp_dagster.core.errors import ModelError

EMBEDDED = "embedded:"


def open_journal(root: UPath) -> Journal:
    """The journal of a store.

    Its write-ahead logs lie beside it or, if the store is remote, in the user's cache folder
    (``AUTOINTERP_CACHE``).
    """
    if is_local(root):
        return Journal(root)
    from autointerp_dagster.adapters.embedded import cache_folder

    return Journal(root, wal_dir=cache_folder() / "journal-wal")


def open_llm(
    config: LLMConfig,
    *,
    journal: Journal,
    model_dir: Path | None = None,
    budget_usd: float | None = None,
    budget_tokens: int | None = None,
) -> JournaledLLM:
    """The language model that a study describes. Close it after use; the journal stays open.

    Nothing is sent to a remote endpoint yet. A local model's files are hashed (its identity),
    its weights are loaded by the first call.

    Args:
        config: Where the model runs.
        journal: Where completed calls are kept.
        model_dir: Where an ``embedded:`` model is unpacked; null: the user's cache folder.
        budget_usd: Stop calling once this much was spent; null: no limit.
        budget_tokens: Likewise, prompt and completion tokens together.

    Raises:
        LLMError: If the endpoint's address carries credentials.
        ModelError: If a local model cannot be found.
    """
    return JournaledLLM(
        open_backend(config, model_dir),
        journal,
        budget_usd=budget_usd,
        budget_tokens=budget_tokens,
    )


def open_backend(config: LLMConfig, model_dir: Path | None = None) -> Backend:
    """The model without journal and budget; see :func:`open_llm`."""
    if isinstance(config, LocalLLMConfig):
        from autointerp_dagster.adapters.llm.local_backend import LocalBackend

        return LocalBackend(find_model(config, model_dir), config)
    from autointerp_dagster.adapters.llm.openai_backend import OpenAIBackend

    return OpenAIBackend(config)


def find_model(config: LocalLLMConfig, model_dir: Path | None = None) -> Path:
    """The folder with a local model's files; downloads a hub model.

    Raises:
        ModelError: If there is no such embedded model, folder or hub model.
    """
    source = config.source
    if source.startswith(EMBEDDED):
        return _embedded(source, model_dir)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=config.revision))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {source!r}: neither a local folder nor a hub model that can be had "
            f"({type(error).__name__}). Check the name, or download it and give its folder."
        ) from error


def _embedded(source: str, model_dir: Path | None) -> Path:
    from autointerp_dagster.adapters.embedded import smollm2_dir

    name = source.removeprefix(EMBEDDED)
    if name != "smollm2-135m-instruct":
        raise ModelError(
            f"model {source!r}: no such embedded chat model. "
            "Use 'embedded:smollm2-135m-instruct', a folder, or a hub name."
        )
    return smollm2_dir(model_dir)

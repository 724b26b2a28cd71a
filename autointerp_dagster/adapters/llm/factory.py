"""From a study's description of a language model to the model."""

from datetime import timedelta
from functools import cache
from pathlib import Path

from upath import UPath

from autointerp_dagster.adapters.llm.backend import Backend
from autointerp_dagster.adapters.llm.client import JournaledLLM, Mode, OnMissing
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.ledger import Ledger
from autointerp_dagster.adapters.llm.managed.servers import ManagedServers
from autointerp_dagster.adapters.remote import is_local
from autointerp_dagster.core.config.models import LLMConfig, LocalLLMConfig
from autointerp_dagster.core.errors import ModelError

EMBEDDED = "embedded:"
SERVER_LOGS = "server-logs"
"""Folder of the user's cache where servers that a run started keep their logs."""


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
    ledger: Ledger | None = None,
    deadline: float | timedelta | None = None,
    mode: Mode = "record",
    on_missing: OnMissing | None = None,
) -> JournaledLLM:
    """The language model that a study describes. Close it after use; the journal stays open.

    Nothing is sent to a remote endpoint yet. A local model's files are hashed (its identity),
    its weights are loaded by the first call.

    Args:
        config: Where the model runs.
        journal: Where completed calls are kept.
        model_dir: Where an ``embedded:`` model is unpacked; null: the user's cache folder.
        ledger: The run's budget; null: no limit. A model in this process costs nothing.
        deadline: See :class:`~.client.JournaledLLM`; so are ``mode`` and ``on_missing``.
        mode: ``replay`` sends nothing.
        on_missing: Told of each call that a replay lacks.

    Raises:
        LLMError: If the endpoint's address carries credentials.
        ModelError: If a local model cannot be found.
    """
    account = None
    if ledger is not None and not isinstance(config, LocalLLMConfig):
        account = ledger.account(config)
    return JournaledLLM(
        open_backend(config, model_dir),
        journal,
        account=account,
        deadline=deadline,
        mode=mode,
        on_missing=on_missing,
    )


def open_backend(config: LLMConfig, model_dir: Path | None = None) -> Backend:
    """The model without journal and budget; see :func:`open_llm`."""
    if isinstance(config, LocalLLMConfig):
        from autointerp_dagster.adapters.llm.local.backend import LocalBackend

        return LocalBackend(find_model(config, model_dir), config)
    if config.serve is not None:
        from autointerp_dagster.adapters.embedded import cache_folder
        from autointerp_dagster.adapters.llm.managed.backend import ManagedBackend

        return ManagedBackend(config, _servers(), cache_folder() / SERVER_LOGS)
    from autointerp_dagster.adapters.llm.remote.backend import OpenAIBackend

    return OpenAIBackend(config)


@cache
def _servers() -> ManagedServers:
    """Those of this process; they end with it."""
    return ManagedServers()


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

"""Language models behind core's :class:`~autointerp_dagster.core.llm.LLM`: remote and in-process.

Every call goes through a journal, so nothing is paid twice; see ``client`` for the order of steps.
"""

from autointerp_dagster.adapters.llm.backend import Backend, CallError, Reply
from autointerp_dagster.adapters.llm.client import Backoff, JournaledLLM
from autointerp_dagster.adapters.llm.factory import (
    find_model,
    open_backend,
    open_journal,
    open_llm,
)
from autointerp_dagster.adapters.llm.journal import Entry, Journal

__all__ = [
    "Backend",
    "Backoff",
    "CallError",
    "Entry",
    "Journal",
    "JournaledLLM",
    "Reply",
    "find_model",
    "open_backend",
    "open_journal",
    "open_llm",
]

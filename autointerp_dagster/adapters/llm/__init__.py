"""Language models behind core's :class:`~autointerp_dagster.core.llm.LLM`: remote and in-process.

Every call goes through a journal, so nothing is paid twice; see ``client`` for the order of steps.
"""

from autointerp_dagster.adapters.llm.backend import Backend, CallError, Reply
from autointerp_dagster.adapters.llm.client import Backoff, JournaledLLM, Mode
from autointerp_dagster.adapters.llm.factory import (
    find_model,
    open_backend,
    open_journal,
    open_llm,
)
from autointerp_dagster.adapters.llm.journal.journal import Entry, Journal
from autointerp_dagster.adapters.llm.ledger import Account, Ledger, SpendFile

__all__ = [
    "Account",
    "Backend",
    "Backoff",
    "CallError",
    "Entry",
    "Journal",
    "JournaledLLM",
    "Ledger",
    "Mode",
    "Reply",
    "SpendFile",
    "find_model",
    "open_backend",
    "open_journal",
    "open_llm",
]

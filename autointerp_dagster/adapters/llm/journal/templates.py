"""Prompts by template and arguments: leading messages that many calls share are stored once.

A template lies at ``<root>/journal-templates/<address>.json``; its address is a hash of its
content. It is durable before any segment names it; a write-ahead log carries its own copies.
"""

import hashlib
import json
import threading
from functools import lru_cache
from typing import NamedTuple

from upath import UPath

from autointerp_dagster.adapters.durable import read_whole, write_durably
from autointerp_dagster.adapters.llm.journal.entries import messages_of, messages_to_json
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import Message


class Template(NamedTuple):
    """Messages that many prompts begin with."""

    address: str
    """Hash of ``content``."""
    content: bytes
    """The messages as JSON."""


@lru_cache(maxsize=64)
def template_of(messages: tuple[Message, ...]) -> Template | None:
    """The template that these messages are; null for none at all."""
    if not messages:
        return None
    content = messages_to_json(messages)
    return Template(hashlib.blake2b(content, digest_size=16).hexdigest(), content)


class TemplateStore:
    """The templates below a root; safe to use from many threads and processes at once."""

    def __init__(self, root: UPath) -> None:
        """Describe them; nothing is read or written yet."""
        self._folder = root / "journal-templates"
        self._lock = threading.Lock()
        self._durable: set[str] = set()
        self._read: dict[str, tuple[Message, ...]] = {}

    def put(self, template: Template) -> None:
        """Return once the template is durable.

        Raises:
            OSError: If it cannot be written.
        """
        with self._lock:
            if template.address not in self._durable:
                write_durably(self._path(template.address), template.content)
                self._durable.add(template.address)

    def get(self, address: str) -> tuple[Message, ...]:
        """The messages of a template.

        Raises:
            StoreError: If it is missing or damaged.
        """
        with self._lock:
            if address not in self._read:
                self._read[address] = self._messages(address)
            return self._read[address]

    def _messages(self, address: str) -> tuple[Message, ...]:
        path = self._path(address)
        try:
            content = read_whole(path)
        except OSError as error:
            is_gone = isinstance(error, FileNotFoundError)
            raise StoreError(
                f"{path}: the beginning of a prompt {'is missing' if is_gone else 'cannot be read'}"
                f" ({error}). {'Restore the file' if is_gone else 'Run again when it can'}; the "
                "answers themselves are not affected."
            ) from error
        if hashlib.blake2b(content, digest_size=16).hexdigest() != address:
            raise StoreError(
                f"{path}: got content that does not match the name. Restore the file; the answers "
                "themselves are not affected."
            )
        return messages_of(json.loads(content))

    def _path(self, address: str) -> UPath:
        return self._folder / f"{address}.json"

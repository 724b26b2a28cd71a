"""A process that asks many questions, to be killed: ``kill_script.py BASE_URL STORE N OUT``."""

import json
import sys
from pathlib import Path

from llm_requests import ask, remote
from upath import UPath

from autointerp_dagster.adapters.llm.client import JournaledLLM
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.remote.backend import OpenAIBackend

MAX_IN_FLIGHT = 16


def main(base_url: str, store: str, n: str, out: str) -> None:
    """Writes every question with its outcome to ``out`` once all are answered."""
    backend = OpenAIBackend(remote(base_url, alias="ours", max_in_flight=MAX_IN_FLIGHT))
    requests = [ask(f"question {i}", top_logprobs=5) for i in range(int(n))]
    with Journal(UPath(store)) as journal, JournaledLLM(backend, journal) as llm:
        outcomes = {
            request.messages[1].content: [done.call_id, done.text, done.reason, repr(done.tokens)]
            for request, done in llm.answer(requests)
        }
    Path(out).write_text(json.dumps(outcomes, sort_keys=True))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Explaining many latents: records in, explanations out, as the model answers."""

from collections.abc import Callable, Iterable, Iterator

from autointerp_dagster.core.explainers.explanation import Explainer, Explanation
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import LLM, JournalBlock, Request
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId


def explain(
    explainer: Explainer,
    records: Iterable[LatentRecord],
    detokenizer: Detokenizer,
    llm: LLM,
    block_of: Callable[[LatentId], JournalBlock],
) -> Iterator[Explanation]:
    """One explanation per record, in the order of the answers.

    Records are drawn lazily and kept only until they are answered.

    Raises:
        LLMError: If no model answers at all.
    """
    asked: dict[int, tuple[Request, LatentRecord]] = {}
    unasked: list[LatentRecord] = []

    def requests() -> Iterator[Request]:
        for record in records:
            request = explainer.request(record, detokenizer, block_of(record.latent))
            if request is None:
                unasked.append(record)
            else:
                asked[id(request)] = (request, record)
                yield request

    for request, completion in llm.answer(requests()):
        _, record = asked.pop(id(request))
        yield explainer.explanation(record, detokenizer, completion)
    for record in unasked:
        yield explainer.explanation(record, detokenizer, None)

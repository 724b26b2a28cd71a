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
    llm: LLM | None,
    block_of: Callable[[LatentId], JournalBlock],
) -> Iterator[Explanation]:
    """One explanation per record, in the order of the answers.

    Records are drawn lazily and kept only until they are answered; of those that ask nobody, the
    finished rows wait for the next answer.

    Args:
        explainer: Whose explanations.
        records: Of the latents.
        detokenizer: Of the subject model.
        llm: Whom it asks; null for an explainer that asks nobody.
        block_of: Where the calls of a latent are kept.

    Raises:
        LLMError: If no model answers at all.
        ValueError: If there is something to ask and nobody to be asked.
    """
    if llm is None:
        for record in records:
            _ensure_nothing_to_ask(explainer.request(record, detokenizer, block_of(record.latent)))
            yield explainer.explanation(record, detokenizer, None)
        return
    asked: dict[int, tuple[Request, LatentRecord]] = {}
    finished: list[Explanation] = []

    def requests() -> Iterator[Request]:
        for record in records:
            request = explainer.request(record, detokenizer, block_of(record.latent))
            if request is None:
                finished.append(explainer.explanation(record, detokenizer, None))
            else:
                asked[id(request)] = (request, record)
                yield request

    for request, completion in llm.answer(requests()):
        _, record = asked.pop(id(request))
        yield explainer.explanation(record, detokenizer, completion)
        while finished:
            yield finished.pop()
    yield from finished


def _ensure_nothing_to_ask(request: Request | None) -> None:
    if request is not None:
        raise ValueError(f"{request.unit}: has a question and no model to ask. Give one.")

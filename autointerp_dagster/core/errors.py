"""The errors a caller may want to handle. Messages read: where: got, wanted. What to do."""


class AutoInterpError(Exception):
    """Base of every error that this package raises on purpose."""


class StudyError(AutoInterpError):
    """A study file, or what it names, cannot be used."""


class CorpusError(AutoInterpError):
    """Text that cannot become a token dataset."""


class ModelError(AutoInterpError):
    """A subject model, tokenizer or hookpoint that does not fit the study."""


class CoderError(AutoInterpError):
    """A sparse coder whose files or shapes are wrong."""


class StoreError(AutoInterpError):
    """The store cannot be read or written, or a blob does not match its checksum."""


class LLMError(AutoInterpError):
    """No language model answers where the study says one does."""


class CheckError(AutoInterpError):
    """A result is beyond what the study's checks allow, so nothing is made from it."""


def told(error: BaseException) -> str:
    """Kind and first line of somebody else's error, for a message of one line; it may say nothing.

    Example: ``FileNotFoundError: no such file``.
    """
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])

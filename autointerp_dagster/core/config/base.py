"""The base of every parameter model."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Parameters(BaseModel, frozen=True):
    """Frozen parameters; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    execution_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that change how fast a result is made, never what it is: not in fingerprints."""

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON-ready values; goes into fingerprints."""
        fields: dict[str, Any] = {}
        for name in type(self).model_fields:
            if name in self.execution_only:
                continue
            fields[name] = _identity_of(getattr(self, name))
        return fields


def _identity_of(value: object) -> Any:
    if isinstance(value, Parameters):
        return value.identity()
    if isinstance(value, dict):
        return {str(key): _identity_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity_of(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)

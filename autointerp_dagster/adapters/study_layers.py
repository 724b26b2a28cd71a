"""A study's layers in plain words: patterns expanded, TransformerLens names translated.

Whoever makes partitions of a study reads it through here first. A study whose layers are plain
module paths is passed on untouched, without a look at model or coders.
"""

from pydantic import ValidationError

from autointerp_dagster.adapters.coder_files import discover_hookpoints
from autointerp_dagster.adapters.found_layers import FoundLayers
from autointerp_dagster.adapters.hookpoints import expand, has_wildcard, is_foreign, translate
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.core.config import FileCoderConfig, RandomCoderConfig
from autointerp_dagster.core.errors import AutoInterpError, ModelError, StudyError
from autointerp_dagster.study import Study


def with_plain_layers(study: Study) -> Study:
    """The same study with every layer written out as a module's path.

    A pattern (``layers.*.mlp``) means, for a coder from files, the coders that lie there; for
    random directions, the places of the coder that they are compared with; for neurons and
    principal components, the places that the study's coders from files have, so that all are
    compared at the same ones, or, where none of these matches, the model's modules. A
    TransformerLens name (``blocks.5.hook_resid_post``) or a path of the whole model
    (``model.layers.5.output``) becomes the hookpoint that it means in the subject model. Layers to
    be discovered are those that the study's store has on record.

    Raises:
        StoreError: If layers are discovered and the store cannot be read.
        StudyError: If a pattern matches nothing, a name means nothing in the model, the coders or
            the model's configuration cannot be read, or there are too many layers.
    """
    if study.discovers:
        return with_found_layers(study, FoundLayers(Store(study.store), study.name))
    names = [layer.rpartition("@")[2] for layer in study.layers]
    if not any(has_wildcard(name) or is_foreign(name) for name in names):
        return study
    try:
        layers = [name for layer in study.layers for name in _plain(study, layer)]
    except AutoInterpError as error:
        raise StudyError(f"study {study.name}: layers: {error}") from error
    try:
        return Study.model_validate({**dict(study), "layers": tuple(dict.fromkeys(layers))})
    except ValidationError as error:
        problems = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise StudyError(f"study {study.name}: with its patterns expanded: {problems}") from error


def with_found_layers(study: Study, records: FoundLayers) -> Study:
    """The same study with the layers on record, those of coders that it still names.

    Raises:
        StoreError: If the store cannot be read.
    """
    found = [one for one in records.layers() if one.key.coder in study.coders]
    return study.with_found({one.key: one.address for one in found})


def _plain(study: Study, layer: str) -> list[str]:
    """What one entry of the study's layers stands for."""
    coder, separator, name = layer.rpartition("@")
    model = open_subject_model(study.models.subject)
    if is_foreign(name):
        name = translate(name, model.model_type)
    if not has_wildcard(name):
        return [f"{coder}{separator}{name}"]
    names = [coder] if separator else list(study.coders)
    found = {each: _places(study, each, name, model) for each in names}
    first = found[names[0]]
    if not separator and all(places == first for places in found.values()):
        return first
    return [f"{each}@{place}" for each, places in found.items() for place in places]


def _places(study: Study, coder: str, pattern: str, model: SubjectModel) -> list[str]:
    """The hookpoints of a pattern at which the study has a coder."""
    config = study.coders[coder]
    if isinstance(config, RandomCoderConfig):
        return _places(study, config.like, pattern, model)
    if isinstance(config, FileCoderConfig):
        try:
            return expand([pattern], discover_hookpoints(config, lambda: model.model_type))
        except ModelError as error:
            raise StudyError(f"coders.{coder}: {error}") from error
    from_files = [of for of in study.coders.values() if isinstance(of, FileCoderConfig)]
    lying = {
        place for of in from_files for place in discover_hookpoints(of, lambda: model.model_type)
    }
    try:
        return expand([pattern], sorted(lying))
    except ModelError:  # neurons are there all the same
        return expand([pattern], model.hookpoints)

"""External: the text, versioned by the hash of its documents or of the files they are in."""

from typing import Any

import dagster as dg

from autointerp_dagster.partitions import observed_asset
from autointerp_dagster.resources.corpora import Corpora
from autointerp_dagster.study import Study


def build_corpus(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @observed_asset(study, "corpus")
    def corpus(corpora: Corpora) -> dg.ObserveResult:
        found = corpora.of(study)
        about: dict[str, Any] = dict(found.about())
        return dg.ObserveResult(data_version=dg.DataVersion(found.identity()), metadata=about)

    return corpus

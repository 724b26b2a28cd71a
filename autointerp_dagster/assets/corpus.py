"""External: the text, versioned by the hash of its documents."""

import dagster as dg

from autointerp_dagster.partitions import observed_asset
from autointerp_dagster.resources.corpora import Corpora
from autointerp_dagster.study import Study


def build_corpus(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @observed_asset(study, "corpus")
    def corpus(corpora: Corpora) -> dg.DataVersion:
        return dg.DataVersion(corpora.of(study).identity())

    return corpus

"""External: the sparse coder of each layer, versioned by the hash of its weights."""

import dagster as dg

from autointerp_dagster.partitions import observed_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.study import Study


def build_sparse_coders(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @observed_asset(study, "sparse_coders")
    def sparse_coders(coders: Coders) -> dg.DataVersionsByPartition:
        return dg.DataVersionsByPartition(dict(coders.identities(study)))

    return sparse_coders

"""A store that is no local folder."""

import dagster as dg
from bench import Bench


def test_a_store_behind_a_url_ends_with_the_same_contents(
    small, tmp_path, instance, monkeypatch
) -> None:
    monkeypatch.setenv("AUTOINTERP_CACHE", str(tmp_path / "cache"))
    overrides = {**small.overrides, "store": f"memory://{tmp_path.name}"}
    remote = Bench(tmp_path, small.world, small.base_url, instance, overrides)
    remote.run()
    assert remote.contents() == small.contents()
    assert remote.stale() == set()
    with dg.DagsterInstance.ephemeral() as fresh:
        again = Bench(tmp_path, small.world, small.base_url, fresh, overrides)
        before = {name: head.path for name, head in remote.heads().items()}
        again.run()
        assert {name: head.path for name, head in again.heads().items()} == before

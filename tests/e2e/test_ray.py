"""``deploy/cluster``: runs as jobs of a Ray cluster, a store in a bucket, records in Postgres."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
import pytest
from bench import Bench, Script
from live import STARTING_S, LiveDagster, wait_for
from object_store import ObjectStore
from ray_cluster import serving

from autointerp_dagster.partitions import partition_key
from autointerp_dagster.resources.versions import CHECKOUT
from autointerp_dagster.study.stages import stages_of

pytest.importorskip("dagster_ray", reason="pip install 'autointerp_dagster[ray]'")
pytestmark = pytest.mark.slow

RUNNING_S = 400
SUCCESS = dg.DagsterRunStatus.SUCCESS
LAUNCH = """
mutation ($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on Error { message }
  }
}"""
SETTINGS = CHECKOUT / "deploy" / "cluster" / "dagster.yaml"


class Cluster(NamedTuple):
    """A UI with its daemon, which sends runs to Ray, and a study that both see."""

    live: LiveDagster
    bench: Bench
    jobs: str
    """Ray's address for jobs."""

    def launch(self, cell: str, stages: list[str]) -> str:
        """Asks for some stages of a cell, as the UI's dialog does; the run's id."""
        (place,) = (place for place in self.bench.study.cells if str(place) == cell)
        key = partition_key(place)
        params = {
            "selector": {
                "repositoryLocationName": "autointerp_dagster.definitions",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": [self.bench.name, stage]} for stage in stages],
            },
            "runConfigData": "{}",
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": str(key)}]},
        }
        launched = self.live.ask(LAUNCH, params=params)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return launched["run"]["runId"]


@pytest.fixture
def cluster(
    small: Bench, s3: ObjectStore, postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    monkeypatch.setenv("AUTOINTERP_POSTGRES_URL", postgres)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept = {"AUTOINTERP_CACHE": str(tmp_path / "cache"), "AUTOINTERP_SPOOL": str(tmp_path / "s")}
    studies = {"AUTOINTERP_STUDIES": str(tmp_path / "studies")}
    with serving(tmp_path / "ray.log", **kept, **studies) as jobs:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", jobs)
        overrides = {**small.overrides, "store": s3.new_root()}
        with dg.DagsterInstance.ephemeral() as alone:
            bench = Bench(tmp_path, small.world, small.base_url, alone, overrides)
            bench.run(until="token_dataset")
        live = LiveDagster(tmp_path, bench.path.parent, SETTINGS.read_text())
        try:
            wait_for(live.is_up, STARTING_S)
            with dg.DagsterInstance.from_config(str(tmp_path / "home")) as instance:
                bench.instance = instance
                for pool in ("gpu", "llm"):  # as docs/deploy.md wants it, before the first run
                    instance.event_log_storage.set_concurrency_slots(pool, 8)
                yield Cluster(live, bench, jobs)
        finally:
            live.stop()


def pid_of(instance: dg.DagsterInstance, run_id: str) -> int | None:
    """The one process that all steps of a run were executed in."""
    events = [record.dagster_event for record in instance.all_logs(run_id)]
    (pid,) = {event.pid for event in events if event is not None and event.is_step_start}
    return pid


def last_words(cluster: Cluster, run_id: str) -> str:
    """What Dagster and Ray say of a run, for whoever reads why it failed."""
    from ray.job_submission import JobSubmissionClient

    records = cluster.bench.instance.all_logs(run_id)
    said = [str(record.user_message or record.dagster_event)[-2000:] for record in records[-6:]]
    log = JobSubmissionClient(cluster.jobs).get_job_logs(f"dagster-run-{run_id}")
    return "\n".join([*said, log[-5000:]])


def test_cells_run_at_the_same_time_on_parts_of_a_gpu_and_end_as_in_one_process(
    cluster: Cluster, small: Bench, script: Script
) -> None:
    from ray.job_submission import JobSubmissionClient

    script.latency_s = lambda number: 0.5  # long enough to see two runs side by side
    bench, study = cluster.bench, cluster.bench.study
    cells = [next(c for c in study.cells if c.layer == layer) for layer in study.layer_keys[:2]]
    names = [stage.name for stage in stages_of(study) if not stage.is_external]
    stages = names[names.index("activation_cache") : names.index("latent_metrics") + 1]
    runs = [cluster.launch(str(cell), stages) for cell in cells]

    def records() -> list[Any]:
        return [bench.instance.get_run_record_by_id(run) for run in runs]

    wait_for(lambda: all(record.dagster_run.is_finished for record in records()), RUNNING_S)
    statuses = [record.dagster_run.status for record in records()]
    failed = [last_words(cluster, r) for r, s in zip(runs, statuses, strict=True) if s != SUCCESS]
    assert not failed, "\n\n".join(failed)
    started, ended = zip(*((r.start_time, r.end_time) for r in records()), strict=True)
    assert max(started) < min(ended)
    assert len({pid_of(bench.instance, run) for run in runs}) == 2

    jobs = JobSubmissionClient(cluster.jobs).list_jobs()
    assert sorted((job.metadata or {})["dagster/run-id"] for job in jobs) == sorted(runs)
    assert not any("not-a-secret" in repr(job) for job in jobs)  # anyone on the dashboard reads it
    done = {(s, str(cell)) for s in stages for cell in cells}
    contents, wanted = bench.contents(), small.contents()
    assert {name: contents[name] for name in done} == {name: wanted[name] for name in done}

"""An S3 server on loopback; what tests of a remote store talk to.

What serves it is imported when it is first wanted: most tests do without.
"""

import json
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest

BUCKET = "interpretations"


class ObjectStore(NamedTuple):
    """A server that speaks S3."""

    endpoint: str

    def new_root(self) -> str:
        """The address of an empty store."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"

    @property
    def client(self) -> Any:
        """What another program would see and do; knows nothing of the stores' own connections."""
        import boto3

        return boto3.client("s3", endpoint_url=self.endpoint)

    @contextmanager
    def denied(self, bucket: str, what: dict[str, Any]) -> Iterator[None]:
        """Nobody may do some things to some objects meanwhile."""
        policy = {"Statement": [{"Effect": "Deny", "Principal": "*", **what}]}
        self.client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
        try:
            yield
        finally:
            self.client.delete_bucket_policy(Bucket=bucket)

    def make_old(self, root: str, days: float) -> None:
        """All objects of a store are that old."""
        from moto.s3.models import s3_backends  # of this process, which serves them

        (backend,) = (found["aws"] for found in s3_backends.values() if "aws" in found)
        when = datetime.now(UTC) - timedelta(days=days)
        for name, key in backend.buckets[BUCKET].keys.items():
            if name.startswith(f"{root.partition(f'{BUCKET}/')[2]}/"):
                key.last_modified = when.replace(tzinfo=None)

    def copy(self, source: str, target: str) -> None:
        """Writes all of one store into another, behind the back of whoever has it open."""
        client, prefix = self.client, source.partition(f"{BUCKET}/")[2]
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        for found in [found for page in pages for found in page.get("Contents", ())]:
            key = f"{target.partition(f'{BUCKET}/')[2]}{found['Key'].removeprefix(prefix)}"
            client.copy_object(
                Bucket=BUCKET, Key=key, CopySource={"Bucket": BUCKET, "Key": found["Key"]}
            )


def forget_connections() -> None:
    """Stores that are opened from now on read the environment again."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def serving() -> Iterator[ObjectStore]:
    """A server with an empty bucket; this process and its children talk to it meanwhile."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        forget_connections()
        store = ObjectStore(f"http://{host}:{port}")
        store.client.create_bucket(Bucket=BUCKET)
        yield store
    forget_connections()
    server.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStore]:
    """An S3 server."""
    with serving() as store:
        yield store

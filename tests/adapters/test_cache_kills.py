"""A pass may be killed at any moment, or run out of disk: the rerun stores the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).with_name("cache_pass.py")


def killed(n_kills: int, model: Path, coders: Path, root: Path) -> dict:
    command = [sys.executable, str(HELPER), str(model), str(coders), str(root), str(n_kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_pass_killed_at_any_moment_and_run_again_stores_the_same_bytes(
    tmp_path, tiny_subject_model_dir, tiny_sparsify_dir
):
    about = killed(3, tiny_subject_model_dir, tiny_sparsify_dir, tmp_path)
    assert about["killed"] == 3
    assert about["resumed"] > 0  # the last was killed at its first checkpoint
    assert about["n_blobs"] == 2 * 4 * 3  # layers, ranges, blobs


@pytest.mark.slow
def test_kill_minus_nine_at_twenty_random_moments_leaves_the_same_shards(
    tmp_path, tiny_subject_model_dir, tiny_sparsify_dir
):
    about = killed(20, tiny_subject_model_dir, tiny_sparsify_dir, tmp_path)
    assert about["killed"] == 20
    assert about["finished"] >= 4
    assert about["resumed"] >= 5


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from cache_pass import Pass
work = Pass(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), n_documents=40)
_ = work.model.base_model
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from autointerp_dagster.core.errors import StoreError
def run():
    work.run()
if sys.argv[5] == "expect":
    import pytest
    with pytest.raises(StoreError) as caught:
        run()
    print(str(caught.value))
else:
    run()
    print(sorted(work.blobs().items()))
"""


def limited(limit: int, expect: str, model: Path, coders: Path, root: Path) -> str:
    code = FULL.format(folder=str(HELPER.parent))
    where = [str(model), str(coders), str(root), str(limit), expect]
    done = subprocess.run(
        [sys.executable, "-c", code, *where], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_full_disk_is_named_with_what_to_do_and_loses_nothing(
    tmp_path, tiny_subject_model_dir, tiny_sparsify_dir
):
    where = (tiny_subject_model_dir, tiny_sparsify_dir)
    message = limited(8000, "expect", *where, tmp_path / "a")
    assert "cannot be written" in message
    assert "AUTOINTERP_SPOOL" in message
    assert "last checkpoint" in message
    assert list((tmp_path / "a" / "spools").glob("*/checkpoint.json"))
    after = limited(1 << 30, "finish", *where, tmp_path / "a")
    assert after == limited(1 << 30, "finish", *where, tmp_path / "b")

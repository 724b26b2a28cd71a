"""Which code and which libraries made a result; recorded, never part of an identity."""

import functools
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

_LIBRARIES = (
    "autointerp_dagster",
    "dagster",
    "numpy",
    "polars",
    "sentence-transformers",
    "torch",
    "transformers",
)


@functools.cache
def library_versions() -> dict[str, str]:
    """Installed versions of what may touch the last bits of a result."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@functools.cache
def code_revision() -> str | None:
    """The commit of the checkout that this package runs from; null outside of one."""
    if not (CHECKOUT / ".git").exists():  # installed: whatever repository lies above is another's
        return None
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None

"""``python -m benchmarks [NAME ...]``: one JSON line per bar; exit code 1 if one is missed."""

import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable

import benchmarks

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(name, "1")  # read when the libraries are first imported, below


def discovered() -> list[str]:
    """The benchmarks by name."""
    modules = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return [name for name in modules if _run_of(name) is not None]


def main(names: list[str]) -> int:
    """Runs some benchmarks, or all; prints a line per bar."""
    known = discovered()
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}. There are: {', '.join(known)}.")
    missed = 0
    for name in names or known:
        run = _run_of(name)
        assert run is not None
        for result in run():
            print(json.dumps(result.line()), flush=True)
            missed += not result.ok
    return 1 if missed else 0


def _run_of(name: str) -> Callable[[], list] | None:
    if name.startswith("_"):
        return None
    return getattr(importlib.import_module(f"benchmarks.{name}"), "run", None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m rehearsals [NAME [OPTION ...]]``: a JSON line per figure; exit 1 if one fails."""

import importlib
import json
import os
import signal
import sys

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(_name, "1")  # read when the libraries are first imported, below

NAMES = ("scale", "faults")


def main(arguments: list[str]) -> int:
    """Runs one rehearsal with its options, or all without any."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, and unmounts
    names = arguments[:1] or list(NAMES)
    if names[0] not in NAMES:
        sys.exit(f"no rehearsal {names[0]!r}. There are: {', '.join(NAMES)}.")
    missed = 0
    for name in names:
        module = importlib.import_module(f"rehearsals.{name}")
        for result in module.run(arguments[1:]):
            print(json.dumps(result.line()), flush=True)
            missed += not result.ok
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Speed and memory against plain versions of the same work. ``python -m benchmarks``.

Every module with a ``run() -> list[Result]`` is a benchmark; a new one is a new module. Each
compares with a plain version on identical input in the same process, asserts that both give the
same result, and counts CPU seconds, so a busy machine changes little. Below a minute on one core.
"""

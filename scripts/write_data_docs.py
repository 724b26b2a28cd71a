"""Write docs/data.md from the declared tables; with --check only say whether it is up to date."""

import inspect
import re
import sys
from pathlib import Path

from autointerp_dagster.core import schemas
from autointerp_dagster.core.schemas import tables

TARGET = Path(__file__).resolve().parent.parent / "docs" / "data.md"
HEAD = """# The tables

Written by `scripts/write_data_docs.py` from `core/schemas/tables.py`; do not edit.
Every table is a Parquet file, sorted by its key; a null is never a zero. `verdicts` are kept per
scorer (`score_<scorer>`) and, like `explanations`, in one file per explainer.
"""


def main() -> int:
    """Exit code 1 if --check is given and the file is out of date."""
    text = HEAD + "".join(section(table) for table in schemas.TABLES)
    if "--check" in sys.argv:
        if TARGET.read_text() == text:
            return 0
        print(f"{TARGET} is out of date: run python scripts/write_data_docs.py")
        return 1
    TARGET.write_text(text)
    return 0


def section(table: schemas.Table) -> str:
    """One table as Markdown."""
    notes = comments(table.name.upper())
    lines = [f"\n## {table.name}\n", f"Key: {', '.join(table.key)}\n"]
    lines += ["| column | type | meaning |", "|---|---|---|"]
    for name, kind in table.columns.items():
        shown = str(kind).replace("|", "\\|")
        lines.append(f"| `{name}` | {shown} | {notes.get(name, '')} |")
    return "\n".join(lines) + "\n"


def comments(constant: str) -> dict[str, str]:
    """The trailing comments of a table's columns, from the source."""
    source = inspect.getsource(tables)
    match = re.search(rf"^{constant} = Table\(.*?^\)", source, re.MULTILINE | re.DOTALL)
    body = match.group(0) if match else ""
    shared = re.search(r"^_METRIC = \{.*?^\}", source, re.MULTILINE | re.DOTALL)
    if "_METRIC" in body and shared:
        body += shared.group(0)
    found = re.findall(r'"(\w+)": pl\.[^#\n]*#\s*(.+)', body)
    return {name: note.replace("|", "\\|") for name, note in found}


if __name__ == "__main__":
    raise SystemExit(main())

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

What is known of a latent's activations stands in three tables:

| table | stage | rows | over which tokens |
|---|---|---|---|
| `firing_counts` | `activation_cache` | the layer | all |
| `latent_statistics` | `activation_cache` | the range | all |
| `latents` | `latent_records` | the range | all; `top_tokens`: activating `train` windows |

All tokens: those of the corpus without BOS, also what a context has beyond its last whole window.
Token counts, context counts and maxima are the same in all three tables. `top_tokens` are not:
those of `latent_statistics` are for people, and no prompt may show them, because they know the
windows that a judge is asked about. Promoted and suppressed tokens come from the weights alone, so
a prompt may show them. `activation_histogram` has 64 bins, the same for every latent; their edges
are `HISTOGRAM_EDGES` in `core/activation_statistics.py`.
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
    constant = table.name.upper()
    notes, about = comments(constant), docstring(constant)
    lines = [f"\n## {table.name}\n", *([f"{about}\n"] if about else [])]
    lines += [f"Key: {', '.join(table.key)}\n"]
    lines += ["| column | type | meaning |", "|---|---|---|"]
    for name, kind in table.columns.items():
        shown = str(kind).replace("|", "\\|")
        lines.append(f"| `{name}` | {shown} | {notes.get(name, '')} |")
    return "\n".join(lines) + "\n"


def docstring(constant: str) -> str:
    """The text below a table's declaration; empty if there is none."""
    pattern = rf'^{constant} = Table\(.*?^\)\n(?:"""(.*?)""")?'
    match = re.search(pattern, inspect.getsource(tables), re.MULTILINE | re.DOTALL)
    text = (match.group(1) or "") if match else ""
    return text.replace("``", "`")


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

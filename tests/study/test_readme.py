import re
from pathlib import Path

import pytest

from autointerp_dagster.study import load_study

README = Path(__file__).parents[2] / "README.md"


def test_the_study_that_the_readme_shows_is_valid(tmp_path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "shown.yaml").write_text(shown)
    study = load_study(tmp_path / "shown.yaml")
    assert study.models.judge != study.models.explainer


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", README.read_text())
    assert links
    assert [path for path, _ in links if not (README.parent / path).exists()] == []
    named = [(path, anchor) for path, anchor in links if anchor]
    assert named
    assert [(path, anchor) for path, anchor in named if anchor not in _anchors(path)] == []


def _anchors(path: str) -> set[str]:
    """Those that GitHub gives a file's headings."""
    headings = re.findall(r"^#+ (.+)$", (README.parent / path).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


CORPORA = (README.parent / "docs" / "corpora.md").read_text()


@pytest.mark.parametrize("shown", re.findall(r"```yaml\n(.*?)```", CORPORA, re.DOTALL))
def test_every_corpus_that_the_docs_show_is_valid(shown, tmp_path):
    (study,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "readme.yaml").write_text(study)
    (tmp_path / "shown.yaml").write_text("extends: readme.yaml\n" + shown)
    assert load_study(tmp_path / "shown.yaml").corpus.kind in shown

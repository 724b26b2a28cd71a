from hypothesis import given
from hypothesis import strategies as st

from autointerp_dagster.adapters.llm.local.prompts import pieces_of


@given(st.data(), st.text(min_size=1))
def test_pieces_joined_are_the_text_whatever_a_tokenizer_leaves_out_or_shares(data, text):
    places = st.integers(0, len(text))
    n_tokens = data.draw(st.integers(1, 8))
    starts = sorted(data.draw(st.lists(places, min_size=n_tokens, max_size=n_tokens)))
    ends = sorted(data.draw(st.lists(places, min_size=n_tokens, max_size=n_tokens)))
    spans = [(min(start, end), max(start, end)) for start, end in zip(starts, ends, strict=True)]
    pieces = pieces_of(text, spans)
    assert len(pieces) == len(spans)
    assert "".join(pieces) == text


@given(st.text(alphabet="aé日🎉 ", min_size=1), st.integers(1, 3))
def test_a_character_stands_whole_at_its_last_token(text, n_bytes):
    """Tokens of so many bytes each, as a byte-level tokenizer may cut them."""
    owners = [i for i, letter in enumerate(text) for _ in letter.encode()]
    chunks = [owners[i : i + n_bytes] for i in range(0, len(owners), n_bytes)]
    spans = [(chunk[0], chunk[-1] + 1) for chunk in chunks]
    pieces = pieces_of(text, spans)
    next_starts = [*(start for start, _ in spans[1:]), len(text)]
    for piece, (start, end), next_start in zip(pieces, spans, next_starts, strict=True):
        assert piece == text[start : min(end, next_start)]


def test_a_space_that_a_tokenizer_trims_belongs_to_the_token_after_it():
    assert pieces_of("a cat ", [(0, 1), (2, 5)]) == ["a", " cat "]


def test_no_tokens_have_no_pieces():
    assert pieces_of("", []) == []

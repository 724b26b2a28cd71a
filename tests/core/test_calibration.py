"""The pack of known rules, and what is said of judges that are known to be good or bad."""

import json
import re
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest

from autointerp_dagster.adapters.llm.fake.rule_judge import rule_judge
from autointerp_dagster.core.calibration import RULES, Rule, build_pack, scorer_report
from autointerp_dagster.core.calibration.rules import FLOOR_STEP, RULE_KINDS
from autointerp_dagster.core.config import DetectionConfig, FuzzingConfig, MetricsConfig
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.highlight import marks_of
from autointerp_dagster.core.llm import Completion, JournalBlock, Token
from autointerp_dagster.core.scorers import LABEL_SCORERS, judge, verdicts_frame

WINDOW_LEN, N_WINDOWS = 16, 8
CONFIGS = {"detection": DetectionConfig(), "fuzzing": FuzzingConfig()}
METRICS = MetricsConfig(n_bootstrap=200)
BLOCK = JournalBlock("judge_calibration", "pack", 0)

# One clause for each rule, in the rules' order; no other rule holds in it, nor comes near.
CLAUSES = (
    "it was not seen there",
    "then she went home again",
    "it was late but warm",
    "they kept walking along there",
    "it went slowly past them",
    "they had 7 red apples",
    "a lake (in Norway) froze",
    'they said "come here" once',
    "was it cold there?",
    "a well-known old house",
    "they heard NATO over there",
    "it was built in 1945 there",
    "the army and its soldiers",
    "a song for the piano",
    "a priest in the church",
    "the league and its coach",
    "a tax and a tax on trade",
    "the police and the judge",
)
FILLER = "the old house stood near a road and a field where some people went to see the sea "


def documents() -> list[str]:
    """For each rule documents in which it holds once, each with a word of its own."""
    return [
        f"{FILLER}w{letters(i)}{letters(n)} {clause}. {FILLER}{FILLER}"
        for i, clause in enumerate(CLAUSES)
        for n in range(14)
    ]


def letters(n: int) -> str:
    return chr(ord("a") + n)


@pytest.fixture(scope="module")
def pack():
    return build_pack(documents(), WINDOW_LEN, N_WINDOWS)


@dataclass(frozen=True)
class Judge:
    """A language model whose answer to a chat is known."""

    answer_of: object
    identity: str = "known"

    def answer(self, requests):
        for number, request in enumerate(requests):
            messages = [{"role": m.role, "content": m.content} for m in request.messages]
            yield request, self.answer_of(str(number), messages)


def ideal(call_id, messages):
    rules = {rule.description: rule.fits for rule in RULES}
    return Completion(call_id, rule_judge(rules)(messages))


def with_logprobs(call_id, messages):
    """An ideal judge whose log-probabilities say the same."""
    text = ideal(call_id, messages).text
    tokens = [
        Token(piece, 0.0, tuple((label, -0.1 if piece == label else -2.4) for label in "01"))
        for piece in re.findall(r"[01]|[^01]+", text)
    ]
    return Completion(call_id, text, tokens=tuple(tokens))


def labels(call_id, messages, label):
    return Completion(call_id, json.dumps([label] * len(json.loads(ideal(call_id, messages).text))))


def report_of(pack, answer_of, scorer="detection", windows=None):
    verdicts = judge(
        LABEL_SCORERS[scorer],
        pack.jobs,
        CONFIGS[scorer],
        pack.detokenizer,
        Judge(answer_of),
        lambda _: BLOCK,
    )
    return scorer_report(scorer, pack, verdicts_frame(verdicts), CONFIGS[scorer], METRICS)


def test_every_description_is_the_floor_of_one_rule_of_another_kind():
    floors = [RULES[(i + FLOOR_STEP) % len(RULES)] for i in range(len(RULES))]
    assert {floor.description for floor in floors} == {rule.description for rule in RULES}
    assert all(a.kind != b.kind for a, b in zip(RULES, floors, strict=True))
    assert {rule.kind for rule in RULES} == set(RULE_KINDS)


def test_each_clause_fits_its_own_rule_alone():
    for i, clause in enumerate(CLAUSES):
        fitting = [n for n, rule in enumerate(RULES) if rule.fits(clause)]
        assert fitting == ([5, 11] if i == 11 else [i])  # years are numbers in digits too


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("He said (quietly) no", True),
        ("never closed ( here", False),
        ("nothing", False),
    ],
)
def test_parentheses_are_a_pair(text, fits):
    assert RULES[6].fits(text) is fits


def test_a_topic_needs_two_different_words_of_its_list():
    war = RULES[12]
    assert not war.is_activating("the army met the Army")
    assert war.is_activating("the army lost the battle")
    assert war.fits("the army")


def test_the_pack_is_balanced_and_its_truth_is_that_of_the_text_shown(pack):
    for planted in pack.latents:
        windows = planted.job.record.windows
        texts = {w.window_id: "".join(pack.detokenizer.pieces(w.tokens)) for w in windows}
        active = [w for w in windows if w.is_activating]
        assert (len(active), len(windows)) == (N_WINDOWS, 2 * N_WINDOWS)
        assert len(texts) == len(windows)
        for window in windows:
            text = texts[window.window_id]
            assert planted.rule.is_activating(text) == window.is_activating
            assert planted.rule.fits(text) == window.is_activating
            assert not planted.floor.fits(text)
            assert len(window.tokens) == WINDOW_LEN


def test_a_latent_fires_on_what_its_rule_matches(pack):
    for planted in pack.latents:
        for window in planted.job.record.activating("test"):
            pieces = pack.detokenizer.pieces(window.tokens)
            marked = "".join(
                p for p, on in zip(pieces, marks_of(window.activations), strict=True) if on
            )
            assert planted.rule.fits(marked)
            rest = "".join(p for p, on in zip(pieces, window.activations, strict=True) if not on)
            assert not planted.rule.fits(rest)


def test_the_draw_depends_on_the_seed_alone(pack):
    again, other = build_pack(documents(), WINDOW_LEN, N_WINDOWS), build_pack(
        documents(), WINDOW_LEN, N_WINDOWS, seed=1
    )  # fmt: skip
    ids = [[w.window_id for w in job.record.windows] for job in pack.jobs]
    assert ids == [[w.window_id for w in job.record.windows] for job in again.jobs]
    assert ids != [[w.window_id for w in job.record.windows] for job in other.jobs]


def test_fewer_windows_are_the_first_of_more(pack):
    few = build_pack(documents(), WINDOW_LEN, 3)
    for small, large in zip(few.jobs, pack.jobs, strict=True):
        ids = [w.window_id for w in small.record.windows]
        assert ids[:3] == [w.window_id for w in large.record.windows][:3]


def test_too_little_text_is_an_error_that_names_rule_and_remedy():
    with pytest.raises(CorpusError, match=r'the word "not".*wanted 99. Ask for fewer windows'):
        build_pack(documents(), WINDOW_LEN, 99)
    with pytest.raises(CorpusError, match="got 0 windows"):
        build_pack([], WINDOW_LEN, 1)


@pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
def test_an_ideal_judge_reaches_the_ceiling_and_guesses_under_the_floor(pack, scorer):
    report = report_of(pack, ideal, scorer)
    assert [kind.kind for kind in report.kinds] == ["all", *RULE_KINDS]
    for kind in report.kinds:
        assert kind.ceiling.value >= 0.99
        assert kind.floor.value == 0.5
        assert kind.lift.lo >= 0.49
        assert kind.auroc.value is None
        assert kind.floor_yes.value == 0
    assert report.overall.ceiling.n == len(RULES)
    assert report.usability == "usable"
    assert report.failures == {}
    assert report.n_verdicts == 2 * pack.n_windows


def test_log_probabilities_give_an_auroc(pack):
    assert report_of(pack, with_logprobs).overall.auroc.value == 1.0


@pytest.mark.parametrize(("label", "sensitivity"), [(0, 0.0), (1, 1.0)])
def test_a_judge_that_says_one_thing_is_unusable_and_its_bias_is_seen(pack, label, sensitivity):
    report = report_of(pack, lambda i, m: labels(i, m, label))
    overall = report.overall
    assert overall.ceiling.value == overall.floor.value == 0.5
    assert overall.sensitivity.value == sensitivity == overall.floor_yes.value
    assert overall.specificity.value == 1 - sensitivity
    assert report.usability == "unusable"
    assert "is not above 0" in report.why
    assert f"It answers {label} to nearly every window." in report.why


def test_a_judge_that_is_right_a_little_more_often_than_not_is_weak(pack):
    def a_little(call_id, messages):
        right = json.loads(ideal(call_id, messages).text)
        is_right = int(call_id) % 16 == 0  # every 16th prompt; otherwise it says yes
        return Completion(call_id, json.dumps(right if is_right else [1] * len(right)))

    report = report_of(pack, a_little)
    assert 0.5 < report.overall.ceiling.value < METRICS.interpretable_cut
    assert report.usability == "weak"
    assert "interpretable_cut" in report.why


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda i, m: Completion(i, "I would say the first."), "unparsable"),
        (lambda i, m: Completion(i, "[1, 0, 1, 0, 1, 0, 1, 0, 1]"), "unparsable"),
        (lambda i, m: Completion(i, None, reason="refused"), "refused"),
        (lambda i, m: Completion(i, "", reason="unparsable"), "unparsable"),
    ],
)
def test_a_judge_that_never_answers_in_the_format_is_unusable(pack, answer, reason):
    report = report_of(pack, answer)
    assert report.failures == {reason: report.n_verdicts}
    assert report.usability == "unusable"
    assert "no label that can be read" in report.why
    assert report.overall.ceiling == (None, None, None, 0)
    assert report.overall.lift.value is None


def test_a_good_judge_that_often_fails_the_format_is_weak(pack):
    def answer(call_id, messages):
        return Completion(call_id, "no") if int(call_id) % 5 == 0 else ideal(call_id, messages)

    report = report_of(pack, answer)
    assert report.usability == "weak"
    assert "over the others only" in report.why


@pytest.mark.parametrize("reason", ["budget", "deadline", "call_failed"])
def test_nothing_is_said_of_a_judge_that_was_not_asked_enough(pack, reason):
    def answer(call_id, messages):
        if int(call_id) > 60:
            return Completion(call_id, None, reason=reason)
        return ideal(call_id, messages)

    report = report_of(pack, answer)
    assert report.usability == "undecided"
    assert reason in report.why


def test_one_latent_has_a_value_and_no_interval(pack):
    only = type(pack)(pack.latents[:1], pack.detokenizer)
    report = report_of(only, ideal)
    assert report.overall.ceiling == (1.0, None, None, 1)
    assert report.usability == "unusable"  # one latent proves nothing


def test_tables_of_the_pack_name_every_latent_once(pack):
    assert pack.selection()["latent"].sort().to_list() == list(range(len(RULES)))
    assert pack.explanations().filter(pl.col("status") == "ok").height == len(RULES)
    assert np.all([isinstance(planted.rule, Rule) for planted in pack.latents])

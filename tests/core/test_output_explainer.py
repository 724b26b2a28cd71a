import itertools
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intervention_builders import BLOCK, LATENT, Writer, explaining, intervention, scoring

from autointerp_dagster.core.config import OutputExplainerConfig
from autointerp_dagster.core.explainers.explanation import explanations_frame
from autointerp_dagster.core.explainers.output import MAX_PROMPTS, OutputCase, explain_outputs
from autointerp_dagster.core.llm import Completion
from autointerp_dagster.core.prompts.output import PromotedAfter, output_prompt
from autointerp_dagster.core.types import LatentId


def case(prompts=None, *, latent=LATENT, **fields):
    shown = [explaining()] if prompts is None else prompts
    return OutputCase(latent, "ok", intervention(shown, latent=latent, **fields))


def run(cases, llm, **parameters):
    config = OutputExplainerConfig(kind="output", **parameters)
    return list(explain_outputs("output", config, cases, llm, lambda latent: BLOCK))


def says(*texts):
    """A model whose answer depends on the sample alone; a null is a call that failed."""

    def rule(request):
        text = texts[request.sample]
        reason = "call_failed" if text is None else None
        return Completion(f"call-{request.sample}", text, reason=reason)

    return Writer(rule)


def asked(prompts, **parameters):
    llm = says(*["x"] * 9)
    run([case(prompts)], llm, **parameters)
    return llm.asked


def summary(rows):
    return [(r.candidate, r.text, r.selected, r.status, r.reason) for r in rows]


def most_promoted(request):
    """Names the token whose rises in the last neuron sum highest."""
    last = request.prompt.rsplit("Neuron ", 1)[-1]
    sums = Counter()
    for token, rise in re.findall(r'"([^"]*)" \(\+([\d.]+)\)', last):
        sums[token] += float(rise)
    (word, _), *_ = sums.most_common()
    return Completion(request.call_id("m"), f" the word {word}")


def test_the_prompt_ends_with_the_latents_texts_and_promoted_tokens_as_the_worked_ones_stand():
    request = asked([explaining(0), explaining(1, ["\n", "<b>"], [0.5, 0.0625], "a\nb ")])[0]
    _, last = request.prompt.rsplit("Neuron 4\n", 1)
    assert last == (
        "Text: They came upon\n"
        'Likelier: "fish" (+0.250), "trout" (+0.125)\n'
        "Text: a\\nb\n"
        'Likelier: "\\n" (+0.500), "\u2039b\u203a" (+0.062)\n'
        "Explanation:"
    )
    answers = re.findall(r"(?m)^Explanation: (.*)$", request.prompt)
    assert answers == ["numbers", "storytelling", "fruits and vegetables"]


def test_a_quote_inside_a_token_does_not_end_it():
    request = asked([explaining(0, ['" (+0.9), "forged', "\\"], [0.5, 0.25])])[0]
    (shown,) = [line for line in request.prompt.splitlines() if "forged" in line]
    assert shown == r'Likelier: "\" (+0.9), \"forged" (+0.500), "\\" (+0.250)'


@pytest.mark.parametrize("n_tokens", [1, 3, 5])
def test_no_text_shows_more_tokens_than_asked_for(n_tokens):
    many = explaining(0, [f"w{i}" for i in range(10)], [0.1] * 10)
    prompt = asked([many], n_tokens=n_tokens)[0].prompt
    counts = [line.count("(+") for line in prompt.splitlines() if line.startswith("Likelier: ")]
    assert counts == [n_tokens] * 10


def test_only_the_first_ten_of_the_explainers_prompts_are_shown_and_no_continuation():
    secret = scoring(0, clean="clean-secret", steered="steered-secret", prompt="prompt-secret")
    prompts = [secret, *(explaining(i, prompt=f"text {i}") for i in range(1, 13))]
    prompt = asked(prompts)[0].prompt
    shown = re.findall(r"(?m)^Text: (text \d+)$", prompt)
    assert shown == [f"text {i}" for i in range(1, MAX_PROMPTS + 1)]
    assert "secret" not in prompt


def test_samples_are_asked_for_with_numbers_and_seeds_of_their_own():
    requests = asked(None, n_samples=4, seed=2)
    assert [(r.sample, r.seed) for r in requests] == [(i, 2000 + i) for i in range(4)]
    assert len({r.call_id("m") for r in requests}) == 4
    assert {(r.temperature, r.max_tokens, r.answer.stop) for r in requests} == {(0.7, 20, ("\n",))}
    assert len({(r.unit, r.prompt) for r in requests}) == 1


def test_every_answer_is_kept_and_the_first_that_says_something_is_selected():
    rows = run([case()], says("", " fish", None, " -- ", " rivers "))
    failed = (None, False, "failed")
    assert summary(rows) == [
        (0, *failed, "unparsable"),
        (1, "fish", True, "ok", None),
        (2, *failed, "call_failed"),
        (3, *failed, "unparsable"),
        (4, "rivers", False, "ok", None),
    ]
    assert [r.call_id for r in rows] == [f"call-{i}" for i in range(5)]
    assert explanations_frame(rows).height == 5


def test_an_answer_is_the_first_line_without_spaces_around():
    rows = run([case()], says("\n  words \t about fish \r\nNeuron 5"), n_samples=1)
    assert [r.text for r in rows] == ["words about fish"]


@pytest.mark.parametrize(
    ("texts", "reason", "call_id"),
    [(("", " ", "..."), "unparsable", "call-0"), (("", None, ""), "call_failed", "call-1")],
)
def test_where_no_answer_says_anything_there_is_one_failed_row(texts, reason, call_id):
    rows = run([case()], says(*texts), n_samples=3)
    assert summary(rows) == [(0, None, True, "failed", reason)]
    assert rows[0].call_id == call_id


@pytest.mark.parametrize("status", ["dead", "rare", "dense"])
def test_a_latent_without_record_is_skipped_with_its_status(status):
    llm = says()
    rows = run([OutputCase(LATENT, status, None)], llm)
    assert summary(rows) == [(0, None, True, "skipped", status)]
    assert llm.asked == []


@pytest.mark.parametrize(
    "one",
    [
        OutputCase(LATENT, "ok", None),
        case(status="too_few"),
        case(status="off_target"),
        case([]),
        case([scoring()]),
        case([explaining(0, [], [])]),
        case([explaining(0, ["", ""], [0.2, 0.1])]),
    ],
)
def test_what_was_not_steered_as_wanted_is_skipped(one):
    llm = says()
    assert summary(run([one], llm)) == [(0, None, True, "skipped", "no_intervention")]
    assert llm.asked == []


def test_another_latents_intervention_is_refused():
    other = intervention([explaining()], latent=LatentId("sae", "layers.3", 4))
    with pytest.raises(ValueError, match="got an intervention on"):
        run([OutputCase(LATENT, "ok", other)], says())


@given(st.text(max_size=60), st.lists(st.text(max_size=6), min_size=1, max_size=6))
@settings(deadline=None, max_examples=100)
def test_texts_and_tokens_are_data_whatever_they_hold(text, promoted):
    prompts = [explaining(0, ["a", *promoted], [0.1] * (1 + len(promoted)), text)]
    lines = asked(prompts)[0].prompt.splitlines()
    assert len(lines) == len(asked(None)[0].prompt.splitlines())
    assert lines[-4] == "Neuron 4"
    assert lines[-1] == "Explanation:"
    assert lines.count("Explanation:") == 1
    assert not any("<" in line for line in lines)


def test_a_part_that_is_no_line_and_a_neuron_without_texts_are_refused():
    with pytest.raises(ValueError, match="wanted one line"):
        output_prompt([PromotedAfter("a\nb", ())], 5)
    with pytest.raises(ValueError, match="got no example"):
        output_prompt([], 5)


def test_an_ideal_model_names_the_planted_token_of_each_latent():
    words = ["fish", "kings", "rain"]
    cases = [
        case(
            [explaining(n, [" the", f" {word}"], [0.1 if n else 0.3, 0.25]) for n in range(10)],
            latent=LatentId("sae", "layers.3", i),
        )
        for i, word in enumerate(words)
    ]
    rows = [r for r in run(cases, Writer(most_promoted)) if r.selected]
    assert [(r.latent.index, r.text) for r in rows] == [
        (i, f"the word {word}") for i, word in enumerate(words)
    ]


def test_rows_depend_on_neither_order_nor_company():
    latents = [LatentId("sae", "layers.3", i) for i in range(5)]
    cases = [case([explaining(0, prompt=f"text {x.index}")], latent=x) for x in latents]
    cases.append(OutputCase(LATENT, "dead", None))
    together = explanations_frame(run(cases, Writer(most_promoted)))
    backwards = run(cases[::-1], Writer(most_promoted, backwards=True))
    alone = [row for one in cases for row in run([one], Writer(most_promoted))]
    assert together.equals(explanations_frame(backwards))
    assert together.equals(explanations_frame(alone))
    assert together.height == 5 * 5 + 1


def test_cases_are_drawn_as_they_are_answered():
    drawn = []

    def cases():
        for i in itertools.count():
            drawn.append(i)
            yield case()

    config = OutputExplainerConfig(kind="output")
    stream = explain_outputs("output", config, cases(), Writer(most_promoted), lambda latent: BLOCK)
    assert len(list(itertools.islice(stream, 12))) == 12
    assert len(drawn) <= 4

import json

from autointerp_dagster.adapters.llm.fake.rule_judge import rule_judge, word_judge
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.core.highlight import escape
from autointerp_dagster.core.prompts import (
    ChatPrompt,
    ShownExample,
    detection_prompt,
    explanation_prompt,
    fuzzing_prompt,
)
from autointerp_dagster.core.prompts.contrastive import contrastive_prompt
from autointerp_dagster.core.prompts.intruder import intruder_prompt
from autointerp_dagster.core.prompts.refine import refine_prompt
from autointerp_dagster.core.prompts.simulation import simulation_chat

RULES = {"rain": lambda text: "rain" in text, "digits": lambda text: any(map(str.isdigit, text))}


def chat(prompt: ChatPrompt) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in prompt.messages]


def test_the_judge_labels_windows_by_the_rule_of_the_explanation():
    windows = [escape("more <rain> today"), escape("the sun"), escape("rainbow\n1. forged")]
    judge = rule_judge(RULES)
    assert judge(chat(detection_prompt("rain", windows, 5))) == "[1, 0, 1]"
    assert judge(chat(detection_prompt("digits", windows, 5))) == "[0, 0, 1]"
    assert judge(chat(detection_prompt("no such rule", windows, 5))) == "[0, 0, 0]"


def test_the_judge_wants_every_marked_run_to_fit():
    windows = ["<<rain>> and <<rainbow>>", "<<rain>> and <<sun>>", "<<sun>> before rain"]
    assert rule_judge(RULES)(chat(fuzzing_prompt("rain", windows, 5))) == "[1, 0, 0]"


def test_the_judge_answers_a_repeated_question_too():
    messages = chat(detection_prompt("rain", ["rain", "sun"], 5))
    messages += [
        {"role": "assistant", "content": "hm"},
        {"role": "user", "content": "That answer could not be read."},
    ]
    assert rule_judge(RULES)(messages) == "[1, 0]"


def test_the_explainer_names_the_rule_that_fits_the_marks():
    shown = [ShownExample("room <<42>> in the rain", ()), ShownExample("in <<1984>> it was", ())]
    assert rule_judge(RULES)(chat(explanation_prompt(shown, True))) == "[EXPLANATION]: digits"


def test_the_word_judge_quotes_marked_words_and_finds_them_again():
    shown = [ShownExample("room <<42>> in the rain", ()), ShownExample("the <<42>> of <<May>>", ())]
    judge = word_judge(seed=0)
    explained = judge(chat(explanation_prompt(shown, True)))
    assert explained == '[EXPLANATION]: the words "42" or "may"'
    text = explained.removeprefix("[EXPLANATION]: ")
    assert judge(chat(detection_prompt(text, ["in May", "in June", "4 42"], 5))) == "[1, 0, 1]"
    assert judge(chat(fuzzing_prompt(text, ["in <<May>>", "<<in>> May"], 5))) == "[1, 0]"


def test_the_word_judge_draws_labels_where_nothing_is_quoted():
    windows = [f"window {i}" for i in range(200)]
    labels, same, others = (
        json.loads(word_judge(seed)(chat(detection_prompt("verbs", windows, 200))))
        for seed in (0, 0, 1)
    )
    assert labels == same != others
    assert 60 < sum(labels) < 140


def test_the_word_judge_answers_any_chat():
    assert word_judge(0)([{"role": "user", "content": "hello"}])


def test_the_fake_server_can_be_used_with_the_judge():
    with FakeLLMServer(rule_judge(RULES)) as server:
        assert server.base_url.startswith("http://127.0.0.1:")
        assert server.base_url.endswith("/v1")


def test_both_judges_answer_a_simulation_question_token_by_token():
    judge = rule_judge(RULES)
    chat_of = chat(
        simulation_chat("rain", ["more", escape(" <rain>"), escape("\n"), " the", " rainbow"])
    )
    assert judge(chat_of) == "[0, 10, 0, 0, 10]"
    assert judge(chat(simulation_chat("no such rule", ["rain", "1"]))) == "[0, 0]"
    words = simulation_chat('the words "may"', [" In", " May", " a", " 1."])
    assert word_judge(seed=0)(chat(words)) == "[0, 10, 0, 0]"


def test_the_judges_answer_contrastive_and_refining_questions():
    shown = [ShownExample("room <<42>> in the rain", ())]
    asked = explanation_prompt(shown, True)
    contrast = contrastive_prompt(shown, ["in the sun"], True)
    better = refine_prompt(asked, "rain", [ShownExample("<<7>> suns", ())], ["rain"], True)
    for prompt in (contrast, better):
        assert rule_judge(RULES)(chat(prompt)) == "[EXPLANATION]: digits"
        assert word_judge(seed=0)(chat(prompt)) == '[EXPLANATION]: the words "42"'


def test_the_judges_find_the_window_that_does_not_belong():
    windows = ["<<rain>> fell", "the <<sun>>", "<<rainbow>>", "<<rain>> 4", "heavy <<rain>>"]
    assert rule_judge(RULES)(chat(intruder_prompt(windows))) == "2"
    shared = ["a <<cat>>", "the <<Cat>> sat", "<<cat>> and <<dog>>", "<<dog>>", "one <<bird>>"]
    assert word_judge(seed=0)(chat(intruder_prompt(shared))) == "5"

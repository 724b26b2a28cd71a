"""Builders for the tests of the local model: a tiny random one whose tokens are bytes."""

from pathlib import Path

import torch
from llm_requests import BLOCK
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from autointerp_dagster.adapters.llm.local.backend import LocalBackend
from autointerp_dagster.adapters.llm.local.model import load_model
from autointerp_dagster.core.config.models import LocalLLMConfig
from autointerp_dagster.core.llm import Continuation, PromptScores, Request

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NATS = 1e-4
"""Between a batch of one and one of many, in fp32."""


def save_model(
    folder: Path, seed: int = 0, template: str | None = TEMPLATE, bos: str | None = None
) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|begin|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token=bos
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


def local(model_dir: Path) -> LocalLLMConfig:
    return LocalLLMConfig(source=str(model_dir), dtype="float32", device="cpu", threads=1)


def backend_of(folder: Path) -> LocalBackend:
    """A backend whose model has nothing kept from other tests."""
    model = load_model(folder, "float32", "cpu")
    model.prefixes.clear()
    model.blocks.clear()
    return LocalBackend(folder, local(folder))


def plain_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """What follows each token, by one forward over the whole text without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def text_request(prompt: str, answer: Continuation | PromptScores, **parameters) -> Request:
    return Request(
        messages=(),
        prompt=prompt,
        answer=answer,
        unit=parameters.pop("unit", "unit"),
        block=BLOCK,
        **parameters,
    )


def scores(given: str, text: str, **parameters) -> Request:
    """A request for the log-probabilities of ``text`` after ``given``."""
    return text_request(given + text, PromptScores(len(given)), **parameters)

"""Train the two sparse autoencoders of the demo study, on a CPU, from PyPI packages alone.

Both read the residual stream of SmolLM2-135M-Instruct, after layer 9 and after layer 14:

1. Split the embedded English documents into training and held-out ones. Cut each into contexts:
   a BOS token and up to 255 tokens of one document.
2. Run the model up to the deepest layer and keep the activations of both layers from that one
   forward pass. Position 0 is dropped: it is an attention sink of a hundred times the norm. So
   are other tokens of more than ten times the median norm (punctuation at position 1).
3. Train a TopK autoencoder on each layer, on random rows of all activations so far; collecting
   and training alternate. An auxiliary loss (AuxK) revives dead latents, decoder rows keep unit
   norm, and the gradient along them is removed.
4. Write the weights in sparsify's format; the input scale is folded into the biases.
5. Read the files back, evaluate on the held-out documents, and write ``metrics.json``.

Method: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (TopK, AuxK).

Usage: ``python examples/train_demo_saes.py --minutes 18``
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from autointerp_dagster.adapters.embedded import EmbeddedDocument, english_documents, smollm2_dir

LAYERS = (9, 14)
CONTEXT_LEN = 256
MIN_CONTEXT_LEN = 32
BATCH_CONTEXTS = 8
HELD_OUT_PERCENT = 5
SPLICED_CONTEXTS = 40
MAX_NORM_RATIO = 10.0


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of the training loop; one set for all layers."""

    num_latents: int = 4096
    """Rows of the dictionary."""
    k: int = 32
    """Latents that may fire at one token."""
    batch_tokens: int = 2048
    """Activations in one step."""
    learning_rate: float = 8e-4
    """Peak rate of Adam; 100 steps of warm-up, linear decay over the last quarter."""
    passes: float = 4.0
    """How often each activation is seen on average, if the time allows."""
    dead_after_tokens: int = 150_000
    """A latent that has not fired for so many tokens is dead."""
    aux_k: int = 64
    """Dead latents that model the residual error at one token."""
    aux_weight: float = 1 / 32
    """Weight of that auxiliary loss."""
    warm_up_tokens: int = 60_000
    """Activations collected before the first step."""


class StopForwardError(Exception):
    """Ends a forward pass after the deepest layer that is wanted."""


def is_held_out(doc_id: str) -> bool:
    """Whether a document is for evaluation only; a hash, so that it never depends on the corpus."""
    digest = hashlib.blake2b(f"held-out\0{doc_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def contexts_of(documents: list[EmbeddedDocument], tokenizer: Any) -> list[Tensor]:
    """Contexts of at most 256 tokens: BOS and a stretch of one document, never of two."""
    contexts = []
    stretch_len = CONTEXT_LEN - 1
    for ids in tokenizer([d.text for d in documents], add_special_tokens=False).input_ids:
        for start in range(0, len(ids), stretch_len):
            stretch = ids[start : start + stretch_len]
            if len(stretch) >= MIN_CONTEXT_LEN:
                contexts.append(torch.tensor([tokenizer.bos_token_id, *stretch]))
    return contexts


def batches_of(contexts: list[Tensor], generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Batches of contexts of like length in random order, as right-padded ids and their mask."""
    order = torch.randperm(len(contexts), generator=generator).tolist()
    order.sort(key=lambda index: len(contexts[index]))  # stable: random among equal lengths
    groups = [order[i : i + BATCH_CONTEXTS] for i in range(0, len(order), BATCH_CONTEXTS)]
    batches = []
    for group in torch.randperm(len(groups), generator=generator).tolist():
        rows = [contexts[index] for index in groups[group]]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        batches.append((ids, torch.arange(ids.shape[1]) < lengths[:, None]))
    return batches


@torch.inference_mode()
def activations(model: Any, ids: Tensor, mask: Tensor) -> dict[int, Tensor]:
    """Residual stream after each of `LAYERS` at every real token but position 0: ``(token, d)``."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[layer] = hidden[:, 1:][mask[:, 1:]].clone()
            if layer == max(LAYERS):
                raise StopForwardError

        return hook

    handles = [model.model.layers[layer].register_forward_hook(keep(layer)) for layer in LAYERS]
    try:
        # Padding is on the right of a causal model: it needs no attention mask.
        model.model(ids, use_cache=False)
    except StopForwardError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def ordinary(found: dict[int, Tensor]) -> Tensor:
    """Tokens whose norm is below ten times the median at every layer.

    Punctuation right after BOS, where a context starts in the middle of a document, becomes an
    attention sink like position 0; one such row outweighs the rest of a batch.
    """
    norms = torch.stack([rows.float().norm(dim=1) for rows in found.values()])
    return (norms < MAX_NORM_RATIO * norms.median(dim=1, keepdim=True).values).all(dim=0)


class TopKAutoencoder(nn.Module):
    """``x ~ decode(topk(relu((x - b_dec) W_enc^T + b_enc)))`` on inputs scaled to unit variance."""

    def __init__(self, sample: Tensor, config: TrainConfig, generator: torch.Generator) -> None:
        """Tied random unit rows; decoder bias at the median, scale from the norm of a sample."""
        super().__init__()
        d_in = sample.shape[1]
        self.config = config
        self.scale = math.sqrt(d_in) / sample.norm(dim=1).median().item()
        rows = torch.randn(config.num_latents, d_in, generator=generator)
        rows = functional.normalize(rows, dim=1)
        self.encoder = nn.Parameter(rows.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(config.num_latents))
        self.decoder = nn.Parameter(rows.clone())
        self.decoder_bias = nn.Parameter(sample.median(dim=0).values * self.scale)

    def pre_activations(self, x: Tensor) -> Tensor:
        """Scores of all latents, before ReLU; the product is in bf16, 2.5 times as fast."""
        centred = (x - self.decoder_bias).bfloat16()
        return (centred @ self.encoder.bfloat16().T).float() + self.encoder_bias

    def decode(self, values: Tensor, latents: Tensor) -> Tensor:
        """Weighted sum of decoder rows, without the bias."""
        return functional.embedding_bag(
            latents, self.decoder, per_sample_weights=values, mode="sum"
        )

    def save(self, folder: Path) -> None:
        """Write sparsify's format; raw activations go in, as the scale is folded into biases."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "encoder.weight": self.encoder,
            "encoder.bias": self.encoder_bias / self.scale,
            "W_dec": self.decoder,
            "b_dec": self.decoder_bias / self.scale,
        }
        save_file(
            {name: t.detach().bfloat16().contiguous() for name, t in tensors.items()},
            folder / "sae.safetensors",
        )
        (folder / "sae.safetensors").chmod(0o644)  # safetensors makes it private
        config = {
            "activation": "topk",
            "expansion_factor": 32,  # sparsify ignores it when num_latents is set
            "normalize_decoder": True,
            "num_latents": self.config.num_latents,
            "k": self.config.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": self.decoder.shape[1],
        }
        (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Trainer:
    """One autoencoder with its optimiser and the memory of when each latent last fired."""

    def __init__(self, sae: TopKAutoencoder) -> None:
        """Start a training run of an untrained autoencoder."""
        self.sae = sae
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, foreach=True)
        self.last_fired = torch.zeros(sae.config.num_latents, dtype=torch.long)
        self.n_seen = 0

    def step(self, rows: Tensor, learning_rate: float) -> tuple[float, float]:
        """One update on raw activations; returns the batch's FVU and the share of dead latents."""
        sae, config = self.sae, self.sae.config
        x = rows.float() * sae.scale
        scores = sae.pre_activations(x)
        values, latents = scores.topk(config.k, dim=-1)
        values = values.relu()
        error = x - sae.decode(values, latents) - sae.decoder_bias
        fvu = _relative_power(error, x)
        self.last_fired[latents[values > 0]] = self.n_seen
        dead = self.n_seen - self.last_fired > config.dead_after_tokens
        loss = fvu + config.aux_weight * self._aux_loss(scores, error.detach(), dead)
        self.optimizer.zero_grad()
        loss.backward()
        self._update(learning_rate)
        self.n_seen += len(rows)
        return fvu.item(), dead.float().mean().item()

    def _aux_loss(self, scores: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """How badly the strongest dead latents alone model what is left of the input."""
        candidates = dead.nonzero().flatten()
        if len(candidates) <= self.sae.config.k:
            return scores.new_zeros(())
        values, chosen = scores[:, candidates].topk(
            min(self.sae.config.aux_k, len(candidates)), dim=-1
        )
        guess = self.sae.decode(values.relu(), candidates[chosen])
        return _relative_power(error - guess, error)

    @torch.no_grad()
    def _update(self, learning_rate: float) -> None:
        decoder = self.sae.decoder
        assert decoder.grad is not None
        along = (decoder.grad * decoder).sum(dim=1, keepdim=True)
        decoder.grad -= along * decoder
        nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        decoder /= decoder.norm(dim=1, keepdim=True)


def _relative_power(error: Tensor, x: Tensor) -> Tensor:
    """Squared error over the squared distance of ``x`` from its mean."""
    return error.square().sum() / (x - x.mean(dim=0)).square().sum()


def train(
    model: Any,
    batches: list[tuple[Tensor, Tensor]],
    config: TrainConfig,
    minutes: float,
    seed: int,
) -> tuple[dict[int, TopKAutoencoder], dict[str, Any]]:
    """Collect activations and train on them in turns until the time or the passes are used up."""
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    n_tokens = sum(int(mask[:, 1:].sum()) for _, mask in batches)
    store = {
        layer: torch.empty(n_tokens, model.config.hidden_size, dtype=torch.bfloat16)
        for layer in LAYERS
    }
    waiting = iter(batches)
    trainers: dict[int, Trainer] = {}
    n_stored = n_seen = step = 0
    progress = 0.0
    while progress < 1:
        wanted = max(config.warm_up_tokens, n_seen / (0.8 * config.passes))
        while n_stored < wanted and (batch := next(waiting, None)) is not None:
            found = activations(model, *batch)
            keep = ordinary(found)
            n_kept = int(keep.sum())
            for layer, rows in found.items():
                store[layer][n_stored : n_stored + n_kept] = rows[keep]
            n_stored += n_kept
        if not trainers:
            for layer in LAYERS:
                sample = store[layer][:n_stored].float()
                trainers[layer] = Trainer(TopKAutoencoder(sample, config, generator))
        ramp = min(1.0, (step + 1) / 100, (1 - progress) / 0.25)
        rows = torch.randint(n_stored, (config.batch_tokens,), generator=generator)
        state = {
            layer: trainer.step(store[layer][rows], config.learning_rate * ramp)
            for layer, trainer in trainers.items()
        }
        step, n_seen = step + 1, n_seen + config.batch_tokens
        elapsed = (time.monotonic() - started) / 60
        progress = max(n_seen / (config.passes * n_tokens), elapsed / minutes)
        if step % 50 == 0:
            report = "; ".join(f"{at}: fvu {f:.3f} dead {d:.3f}" for at, (f, d) in state.items())
            typer.echo(f"{elapsed:5.1f} min  {n_stored} tokens, {n_seen} seen  {report}")
    facts = {
        "n_train_tokens_unique": n_stored,
        "n_train_tokens_seen": n_seen,
        "train_minutes": round((time.monotonic() - started) / 60, 2),
    }
    return {layer: trainer.sae for layer, trainer in trainers.items()}, facts


class SavedSae:
    """An autoencoder as it lies on disk, in float32: what a user of the files gets."""

    def __init__(self, folder: Path) -> None:
        """Read ``cfg.json`` and ``sae.safetensors``."""
        self.k = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))["k"]
        weights = load_file(folder / "sae.safetensors")
        self.encoder = weights["encoder.weight"].float()
        self.encoder_bias = weights["encoder.bias"].float()
        self.decoder = weights["W_dec"].float()
        self.decoder_bias = weights["b_dec"].float()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and numbers of the latents that fire, ``(token, k)`` each."""
        scores = (x - self.decoder_bias) @ self.encoder.T + self.encoder_bias
        values, latents = scores.relu().topk(self.k, dim=-1)
        return values, latents

    def reconstruct(self, x: Tensor) -> Tensor:
        """The activations as the latents see them."""
        values, latents = self.encode(x)
        bag = functional.embedding_bag(latents, self.decoder, per_sample_weights=values, mode="sum")
        return bag + self.decoder_bias


@torch.inference_mode()
def reconstruction_metrics(sae: SavedSae, x: Tensor) -> dict[str, float]:
    """Fraction of variance unexplained, latents per token, and shares of dead and dense latents."""
    fires = torch.zeros(len(sae.encoder))
    squared_error = n_active = 0.0
    for rows in x.split(4096):
        values, latents = sae.encode(rows)
        fires.index_add_(0, latents.flatten(), (values > 0).float().flatten())
        n_active += (values > 0).sum().item()
        squared_error += (rows - sae.reconstruct(rows)).square().sum().item()
    variance = (x - x.mean(dim=0)).square().sum().item()
    return {
        "fvu": squared_error / variance,
        "l0": n_active / len(x),
        "dead_share": (fires == 0).float().mean().item(),
        "n_latents_firing_above_10_percent": int((fires > 0.1 * len(x)).sum()),
    }


@contextmanager
def replaced(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a layer's output at every position but 0."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        new = torch.cat([hidden[:, :1], change(hidden[:, 1:].float()).to(hidden.dtype)], dim=1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def cross_entropy(model: Any, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean next-token loss in nats over real tokens; the first prediction is that at position 1."""
    total, n_tokens = 0.0, 0
    for ids, mask in batches:
        logits = model(ids, use_cache=False).logits[:, 1:-1].float()
        real = mask[:, 2:]
        total += functional.cross_entropy(logits[real], ids[:, 2:][real], reduction="sum").item()
        n_tokens += int(real.sum())
    return total / n_tokens


def splice_metrics(
    model: Any,
    layer: int,
    sae: SavedSae,
    mean: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    ce_original: float,
) -> dict[str, float]:
    """How much of the model's loss survives when the autoencoder stands in for the layer."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "sae": lambda x: sae.reconstruct(x.flatten(0, 1)).view_as(x),
        "mean_ablated": lambda x: mean.expand_as(x),
        "zero_ablated": torch.zeros_like,
    }
    ce = {"original": ce_original}
    for name, change in changes.items():
        with replaced(model.model.layers[layer], change):
            ce[name] = cross_entropy(model, batches)
    lost = ce["sae"] - ce["original"]
    return {f"ce_{name}": value for name, value in ce.items()} | {
        "loss_recovered_vs_zero": 1 - lost / (ce["zero_ablated"] - ce["original"]),
        "loss_recovered_vs_mean": 1 - lost / (ce["mean_ablated"] - ce["original"]),
    }


def evaluate(model: Any, contexts: list[Tensor], out: Path, seed: int) -> dict[str, Any]:
    """Metrics of every saved autoencoder on the contexts of held-out documents."""
    batches = batches_of(contexts, torch.Generator().manual_seed(seed))
    spliced = batches[: SPLICED_CONTEXTS // BATCH_CONTEXTS]
    ce_original = cross_entropy(model, spliced)
    parts = [activations(model, ids, mask) for ids, mask in batches]
    found = {layer: torch.cat([part[layer] for part in parts]).float() for layer in LAYERS}
    keep = ordinary(found)
    metrics: dict[str, Any] = {}
    for layer in LAYERS:
        x = found[layer][keep]
        sae = SavedSae(out / f"layers.{layer}")
        values = reconstruction_metrics(sae, x)
        values |= splice_metrics(model, layer, sae, x.mean(dim=0), spliced, ce_original)
        metrics[f"layers.{layer}"] = {name: round(value, 4) for name, value in values.items()}
        metrics[f"layers.{layer}"] |= {
            "n_held_out_tokens": len(x),
            "n_sink_tokens_left_out": int((~keep).sum()),
            "n_spliced_tokens": sum(int(mask[:, 2:].sum()) for _, mask in spliced),
        }
    return metrics


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("studies/demo-sae"),
    minutes: Annotated[float, typer.Option(help="Training time, evaluation excluded.")] = 18,
    max_tokens: Annotated[int, typer.Option(help="Activations to collect at most.")] = 800_000,
    threads: Annotated[int, typer.Option(help="CPU threads; 1 on a busy machine.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of order, weights and batches.")] = 0,
) -> None:
    """Train, save and evaluate the autoencoders of the demo study."""
    torch.set_num_threads(threads)
    folder = smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    documents = english_documents()
    held_out = [document for document in documents if is_held_out(document.doc_id)]
    train_docs = [document for document in documents if not is_held_out(document.doc_id)]
    batches = batches_of(contexts_of(train_docs, tokenizer), torch.Generator().manual_seed(seed))
    batches = batches[: max_tokens // (CONTEXT_LEN * BATCH_CONTEXTS)]
    config = TrainConfig()
    saes, facts = train(model, batches, config, minutes, seed)
    for layer, sae in saes.items():
        sae.save(out / f"layers.{layer}")
    metrics = {
        "model": folder.name,
        "seed": seed,
        "threads": threads,
        "num_latents": config.num_latents,
        "k": config.k,
        "n_train_documents": len(train_docs),
        "n_held_out_documents": len(held_out),
        **facts,
        "layers": evaluate(model, contexts_of(held_out, tokenizer), out, seed),
    }
    text = json.dumps(metrics, indent=2)
    (out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)

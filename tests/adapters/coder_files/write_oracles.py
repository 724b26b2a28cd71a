"""Writes the oracles: checkpoints of random weights by the packages themselves, and their encode.

The packages' pins clash with ours and with each other's, so each has an environment of its own:

    python -m venv V && V/bin/pip install torch==2.13.0 eai-sparsify==1.3.3
    V/bin/python tests/adapters/coder_files/write_oracles.py sparsify

or sae-lens==6.54.12 and ``saelens``, or einops, ``--no-deps`` dictionary-learning==0.1.0 and
``dictionary_learning``. With ``--check`` nothing is written: what the installed package gives is
compared with what is committed. A case is a folder as the package wrote it, and in it
``expected.safetensors``: ``x``, ``encoded`` and, where the package can, ``decoded``.
"""

import argparse
import importlib.metadata
import json
import math
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent / "oracles"
DISTRIBUTIONS = {
    "sparsify": "eai-sparsify",
    "saelens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
}
D_IN, D_OUT, N_LATENTS, K, N_TOKENS = 8, 12, 24, 4, 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Write = Callable[[Path], dict[str, Tensor]]
"""Writes a checkpoint into a folder and gives the expected tensors."""
Case = tuple[str, Write]
"""Its name, and what writes it."""


def randomise(module: nn.Module, scale: float = 0.5) -> None:
    """Random weights of a size at which some latents fire and most do not."""
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if "threshold" in name:
                parameter.uniform_(0.0, 0.8)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=scale)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(N_TOKENS, D_IN)).to(dtype)


def sparsify_cases() -> Iterator[Case]:
    from sparsify import SparseCoder, SparseCoderConfig

    def write(dtype: torch.dtype, hookpoint: str, **config: object) -> Write:
        def case(folder: Path) -> dict[str, Tensor]:
            settings = SparseCoderConfig(num_latents=N_LATENTS, k=K, **config)
            coder = SparseCoder(D_IN, settings, dtype=dtype)
            randomise(coder)
            coder.save_to_disk(folder / hookpoint)
            x = inputs(dtype)
            found = coder.encode(x)
            encoded = torch.zeros(N_TOKENS, N_LATENTS, dtype=dtype)
            encoded.scatter_(1, found.top_indices, found.top_acts)
            return {"x": x, "encoded": encoded, "decoded": coder(x).sae_out}

        return case

    f32 = torch.float32
    yield "topk", write(f32, "layers.3")
    yield "topk_bfloat16", write(torch.bfloat16, "layers.3")
    yield "groupmax", write(f32, "layers.3.mlp", activation="groupmax")
    yield "seed", write(f32, "layers.3/seed1")
    yield "best", write(f32, "best/layers.3/layers.3")
    yield "transcoder", write(f32, "layers.3.mlp", transcode=True)
    yield "skip_transcoder", write(f32, "layers.3.mlp", transcode=True, skip_connection=True)
    yield "expansion_factor", write_expansion(SparseCoder, SparseCoderConfig)


def write_expansion(coder_class: type, config_class: type) -> Write:
    """``num_latents: 0``."""

    def case(folder: Path) -> dict[str, Tensor]:
        coder = coder_class(D_IN, config_class(expansion_factor=3, k=K))
        randomise(coder)
        coder.save_to_disk(folder / "layers.3")
        x = inputs()
        found = coder.encode(x)
        encoded = torch.zeros(N_TOKENS, 3 * D_IN).scatter_(1, found.top_indices, found.top_acts)
        return {"x": x, "encoded": encoded, "decoded": coder(x).sae_out}

    return case


class Lens:
    """What SAELens writes, in its several ways."""

    def __init__(self) -> None:
        import sae_lens

        self.module: Any = sae_lens

    def metadata(self, hook_name: str = "blocks.3.hook_resid_post", **more: object) -> Any:
        from sae_lens.saes.sae import SAEMetadata

        return SAEMetadata(hook_name=hook_name, model_name="gpt2", **more)

    def expected(self, sae: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        x = inputs(dtype)
        shaped = x.reshape(N_TOKENS, 2, -1) if sae.cfg.reshape_activations == "hook_z" else x
        with torch.no_grad():
            encoded, decoded = sae.encode(shaped), sae(shaped)
        return {"x": x, "encoded": encoded, "decoded": decoded.reshape(N_TOKENS, -1)}

    def make(self, kind: str, **config: object) -> Any:
        settings = {"d_in": D_IN, "d_sae": N_LATENTS, "metadata": self.metadata(), **config}
        sae = getattr(self.module, kind)(getattr(self.module, f"{kind}Config")(**settings))
        randomise(sae)
        return sae

    def saved(self, kind: str, dtype: str = "float32", **config: object) -> Write:
        def case(folder: Path) -> dict[str, Tensor]:
            sae = self.make(kind, dtype=dtype, **config)
            sae.save_model(folder)
            return self.expected(sae, getattr(torch, dtype))

        return case

    def trained(self, kind: str, is_checkpoint: bool = False, **config: object) -> Write:
        """As saved for use, or a checkpoint of the training, which SAELens reads the same."""

        def case(folder: Path) -> dict[str, Tensor]:
            training = self.make(kind, **config)
            if hasattr(training, "topk_threshold"):
                training.topk_threshold.fill_(0.6)
            with tempfile.TemporaryDirectory() as used:
                training.save_inference_model(used)
                sae = self.module.SAE.load_from_disk(used)
            (training.save_model if is_checkpoint else training.save_inference_model)(folder)
            return self.expected(sae, torch.float32)

        return case

    def old(self, **changes: object) -> Write:
        """A configuration as SAELens wrote it before 6.0, read by SAELens now."""

        def case(folder: Path) -> dict[str, Tensor]:
            self.saved("StandardSAE")(folder)
            file = folder / "cfg.json"
            flat = json.loads(file.read_text())
            for key in ("metadata", "architecture", "reshape_activations"):
                del flat[key]
            flat |= {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2", **changes}
            flat = {key: value for key, value in flat.items() if value != "absent"}
            file.write_text(json.dumps(flat))
            return self.expected(self.module.SAE.load_from_disk(folder), torch.float32)

        return case

    def with_log_threshold(self, folder: Path) -> dict[str, Tensor]:
        """Checkpoints of older trainings hold the thresholds' logarithm."""
        found = self.saved("JumpReLUSAE")(folder)
        tensors = load_file(folder / "sae_weights.safetensors")
        tensors["log_threshold"] = tensors.pop("threshold").log()
        save_file(tensors, folder / "sae_weights.safetensors")
        return found

    def temporal(self, folder: Path) -> dict[str, Tensor]:
        """It encodes sequences, so there is nothing to compare with; it is refused."""
        config = {"n_heads": 2, "n_attn_layers": 1, "bottleneck_factor": 1}
        self.make("TemporalSAE", **config).save_model(folder)
        return {"x": inputs()}


def saelens_cases() -> Iterator[Case]:
    lens = Lens()
    hook_z = lens.metadata("blocks.3.attn.hook_z")
    across = lens.metadata("blocks.3.ln2.hook_normalized", hook_name_out="blocks.3.hook_mlp_out")
    to_out = {"d_out": D_OUT, "apply_b_dec_to_input": False, "metadata": across}
    widths = {"matryoshka_widths": [8, N_LATENTS]}
    yield "standard", lens.saved("StandardSAE")
    yield "standard_without_b_dec", lens.saved("StandardSAE", apply_b_dec_to_input=False)
    yield "standard_bfloat16", lens.saved("StandardSAE", dtype="bfloat16")
    for norm in ("layer_norm", "constant_norm_rescale", "expected_average_only_in"):
        yield f"standard_{norm}", lens.saved("StandardSAE", normalize_activations=norm)
    shaped = {"reshape_activations": "hook_z", "metadata": hook_z}
    yield "standard_hook_z", lens.saved("StandardSAE", **shaped)
    yield "gated", lens.saved("GatedSAE")
    yield "jumprelu", lens.saved("JumpReLUSAE", apply_b_dec_to_input=False)
    yield "jumprelu_bfloat16", lens.saved("JumpReLUSAE", dtype="bfloat16")
    yield "jumprelu_log_threshold", lens.with_log_threshold
    yield "topk", lens.saved("TopKSAE", k=K)
    yield "topk_layer_norm", lens.saved("TopKSAE", k=K, normalize_activations="layer_norm")
    yield "topk_rescaled", lens.saved("TopKSAE", k=K, rescale_acts_by_decoder_norm=True)
    yield "topk_trained", lens.trained("TopKTrainingSAE", k=K)
    for kind, more in (("BatchTopK", {}), ("MatryoshkaBatchTopK", widths)):
        settings = {"k": float(K), **more}
        yield kind.lower(), lens.trained(f"{kind}TrainingSAE", **settings)
        checkpoint = lens.trained(f"{kind}TrainingSAE", is_checkpoint=True, **settings)
        yield f"{kind.lower()}_checkpoint", checkpoint
    raw = {"k": float(K), "rescale_acts_by_decoder_norm": False}
    yield "batchtopk_not_rescaled", lens.trained("BatchTopKTrainingSAE", is_checkpoint=True, **raw)
    yield "transcoder", lens.saved("Transcoder", **to_out)
    yield "skip_transcoder", lens.saved("SkipTranscoder", **to_out)
    yield "jumprelu_transcoder", lens.saved("JumpReLUTranscoder", **to_out)
    yield "jumprelu_skip_transcoder", lens.saved("JumpReLUSkipTranscoder", **to_out)
    yield "old_standard", lens.old(hook_name="absent", hook_point="blocks.3.hook_resid_post")
    yield "old_topk", lens.old(activation_fn_str="topk", activation_fn_kwargs={"k": K})
    yield "old_normalised", lens.old(normalize_activations=True)
    yield "old_defaults", lens.old(apply_b_dec_to_input="absent")
    yield "refused_abstopk", lens.saved("AbsTopKSAE", k=K)
    yield "refused_matching_pursuit", lens.saved("MatchingPursuitSAE")
    yield "refused_temporal", lens.temporal


def dictionary_learning_cases() -> Iterator[Case]:
    # Its __init__ imports nnsight, whose old version it needs; the dictionaries do not.
    found = importlib.metadata.distribution("dictionary-learning").locate_file("")
    package = types.ModuleType("dictionary_learning")
    package.__path__ = [str(Path(str(found)) / "dictionary_learning")]
    sys.modules["dictionary_learning"] = package
    from dictionary_learning.dictionary import (
        AutoEncoder,
        AutoEncoderNew,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
    )
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    def write(
        kind: type, *more: object, threshold: float | None = None, backup: float | None = None
    ) -> Write:
        def case(folder: Path) -> dict[str, Tensor]:
            ae = kind(D_IN, N_LATENTS, *more)
            randomise(ae)
            if threshold is not None:
                ae.threshold.fill_(threshold)
            settings = {
                "dict_class": kind.__name__, "activation_dim": D_IN, "dict_size": N_LATENTS,
                "layer": 3, "lm_name": "EleutherAI/pythia-70m",
                "submodule_name": "resid_post_layer_3", **({"k": K} if more else {}),
            }  # fmt: skip
            about = {"trainer": settings, "buffer": {"d_submodule": D_IN, "io": "out"}}
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(about))
            state: dict[str, object] = dict(ae.state_dict())
            if backup is not None:
                state = {"step": 5, "ae": state, "config": settings, "norm_factor": backup}
            torch.save(state, folder / "ae.pt")
            if backup is not None:
                ae.scale_biases(backup)
                torch.save(ae.state_dict(), folder / "scaled.pt")
            read = folder / ("ae.pt" if backup is None else "scaled.pt")
            coder = kind.from_pretrained(read)
            (folder / "scaled.pt").unlink(missing_ok=True)
            x = inputs()
            with torch.no_grad():
                return {"x": x, "encoded": coder.encode(x), "decoded": coder(x)}

        return case

    yield "AutoEncoder", write(AutoEncoder)
    yield "AutoEncoderNew", write(AutoEncoderNew)
    yield "GatedAutoEncoder", write(GatedAutoEncoder)
    yield "JumpReluAutoEncoder", write(JumpReluAutoEncoder)
    yield "AutoEncoderTopK", write(AutoEncoderTopK, K)
    yield "BatchTopKSAE", write(BatchTopKSAE, K, threshold=0.7)
    yield "BatchTopKSAE_untrained", write(BatchTopKSAE, K)
    yield "MatryoshkaBatchTopKSAE", write(MatryoshkaBatchTopKSAE, K, [8, 16], threshold=0.7)
    yield "AutoEncoder_backup", write(AutoEncoder, backup=2.5)
    yield "GatedAutoEncoder_backup", write(GatedAutoEncoder, backup=2.5)
    yield "JumpReluAutoEncoder_backup", write(JumpReluAutoEncoder, backup=2.5)
    yield "BatchTopKSAE_backup", write(BatchTopKSAE, K, threshold=0.7, backup=2.5)


CASES = {
    "sparsify": sparsify_cases,
    "saelens": saelens_cases,
    "dictionary_learning": dictionary_learning_cases,
}


def versions_of(package: str) -> dict[str, str]:
    names = (DISTRIBUTIONS[package], "torch")
    return {name: importlib.metadata.version(name) for name in names}


def write_all(package: str, folder: Path) -> None:
    """Every case of a package below a folder."""
    for number, (name, write) in enumerate(CASES[package]()):
        torch.manual_seed(number)
        expected = write(folder / name)
        tensors = {key: tensor.detach().contiguous() for key, tensor in expected.items()}
        save_file(tensors, folder / name / "expected.safetensors")
    versions = json.dumps(versions_of(package), indent=2)
    (folder / "versions.json").write_text(f"{versions}\n")


def differences(committed: Path, fresh: Path) -> Iterator[str]:
    """What the committed oracles of a package do not agree with, case by case."""
    cases = {path.name for path in committed.iterdir() if path.is_dir()}
    for name in sorted(cases ^ {path.name for path in fresh.iterdir() if path.is_dir()}):
        yield f"{name}: on one side only"
    for name in sorted(cases):
        expected = load_file(committed / name / "expected.safetensors")
        found = load_file(fresh / name / "expected.safetensors")
        for key, tensor in expected.items():
            tolerance = TOLERANCE[tensor.dtype]
            far = float((tensor.float() - found[key].float()).abs().max())
            if math.isnan(far) or far > tolerance * float(tensor.float().abs().max()):
                yield f"{name}: {key} differs by {far}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", choices=CASES)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / asked.package if asked.check else HERE / asked.package
        folder.mkdir(parents=True, exist_ok=True)
        write_all(asked.package, folder)
        found = list(differences(HERE / asked.package, folder)) if asked.check else []
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()

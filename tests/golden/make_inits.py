"""PEFT's initial LoRA factors on small weights, and what its incremental PCA finds.

Run: python make_inits.py          (torch, peft)

Writes inits.safetensors next to this file. For the shapes `wide` [16, 24] and `tall` [24, 16], rank 4 and alpha 10:
  SHAPE.weight, SHAPE.gradient, SHAPE.sample.0..2 [tokens, in]       what the initialisations see
  SHAPE.NAME.a, .b, .base      A, B and the weight afterwards, for pissa, pissa_niter_16, olora, corda.ipm, corda.kpm,
                               lora_ga.DIRECTION.SCALE
  pca.batch.0..2, pca.components [6, 10], pca.singular_values, pca.explained_variance_ratio
                               with the full decomposition in place of the randomised one that EVA uses
Singular vectors are determined up to their signs only. LoRA-GA's are taken from an exact decomposition here, as the
randomised one of PEFT starts from random numbers.
"""

import dataclasses
import sys
import types
from pathlib import Path

import torch

# PEFT's CorDA takes one decorator from the attrs package, which PEFT does not depend on.
sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.incremental_pca import IncrementalPCA
from safetensors.torch import save_file

RANK, ALPHA = 4, 10
SHAPES = {"wide": (16, 24), "tall": (24, 16)}


class Model(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.lin = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.lin.weight.data = weight.clone()

    def forward(self, x):
        return self.lin(x)


def decaying(rows, columns, generator):
    """A random matrix whose singular values fall by a fifth each, so that every vector is well determined."""
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    k = min(rows, columns)
    return u[:, :k] @ torch.diag(0.8 ** torch.arange(k)) @ v[:k]


def exact_svd_lowrank(a, q, niter):
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    return u[:, :q], s[:q], vt[:q].T


def initialise(weight, init, prepare=None, **arguments):
    model = Model(weight)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["lin"], init_lora_weights=init, **arguments)
    if prepare:
        prepare(model, config)
    layer = get_peft_model(model, config).base_model.model.lin
    return {
        "a": layer.lora_A["default"].weight.data.clone(),
        "b": layer.lora_B["default"].weight.data.clone(),
        "base": layer.base_layer.weight.data.clone(),
    }


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    tensors = {}

    def put(name, parts):
        tensors.update({f"{name}.{key}": value.contiguous() for key, value in parts.items()})

    for shape, (rows, columns) in SHAPES.items():
        weight, gradient = decaying(rows, columns, generator), decaying(rows, columns, generator)
        mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
        samples = [torch.randn(tokens, columns, generator=generator) @ mixing for tokens in (30, 17, 41)]
        put(shape, {"weight": weight, "gradient": gradient})
        put(f"{shape}.sample", {str(i): sample for i, sample in enumerate(samples)})
        for init in ["pissa", "pissa_niter_16", "olora"]:
            put(f"{shape}.{init}", initialise(weight, init))
        for method in ["ipm", "kpm"]:

            def prepare(model, config):
                preprocess_corda(model, config, run_model=lambda: [model(sample[None]) for sample in samples])

            put(f"{shape}.corda.{method}", initialise(weight, "corda", prepare, corda_config=CordaConfig(corda_method=method)))
        original, torch.svd_lowrank = torch.svd_lowrank, exact_svd_lowrank
        for direction in ["ArBr", "A2rBr", "ArB2r"]:
            for scale in ["stable", "weight_svd", "gd_scale", "unit"]:

                def prepare(model, config):
                    model.lin._peft_loraga_grad = gradient.clone()

                config = LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
                put(f"{shape}.lora_ga.{direction}.{scale}", initialise(weight, "lora_ga", prepare, lora_ga_config=config))
        torch.svd_lowrank = original

    mixing = decaying(10, 10, generator)
    pca = IncrementalPCA(n_components=6)
    for i, rows in enumerate([12, 9, 25]):
        batch = torch.randn(rows, 10, generator=generator) @ mixing + torch.randn(10, generator=generator)
        tensors[f"pca.batch.{i}"] = batch
        pca.partial_fit(batch.double())
    put("pca", {
        "components": pca.components_.float(), "singular_values": pca.singular_values_.float(),
        "explained_variance_ratio": pca.explained_variance_ratio_.float(),
    })  # fmt: skip
    out = Path(__file__).resolve().parent / "inits.safetensors"
    save_file(tensors, out)
    out.chmod(0o644)


if __name__ == "__main__":
    main()

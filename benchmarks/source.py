"""A training step of ours beside the same step by the public source of VideoSAUR, which has DINOSAUR as well.

    git clone https://github.com/martius-lab/videosaur CHECKOUT
    pip install --no-deps pytorch-lightning lightning-utilities torchmetrics einops omegaconf webdataset braceexpand \
        antlr4-python3-runtime==4.9.3
    OMP_NUM_THREADS=1 python -m benchmarks.source CHECKOUT [--preset dinosaur] [--batch-size 4] [--rounds 7]

Both get the same ready features, so the backbone, which the source runs at every step, is in neither. The source's
model is built by its own ``models.build`` from a configuration with our preset's sizes; a step is forward, loss,
backward, clipping and Adam (fused in ours), in float32. Nothing of the source is in this repository.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import alternate, paired_ratio, report
from featcache.machine import pick_device
from slotlab.config.load import load_config
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import Config
from slotlab.models.build import empty_model
from slotlab.models.inputs import Features
from slotlab.models.randomness import Draws
from slotlab.training.losses import losses, total

PRESETS = ("dinosaur", "videosaur")
Loss = Callable[[], Tensor]


class Ready(nn.Module):
    """Stands where the source has a ViT: (B, 1, N, D) ready features to (B, N, D)."""

    def forward(self, features: Tensor) -> Tensor:
        return features.squeeze(1)


def ours(config: Config, features: Tensor) -> tuple[nn.Module, Loss]:
    *_, patches, dim = features.shape
    side = round(patches**0.5)
    model = empty_model(config, Features("", (side, side), dim)).to(features.device)
    return model, lambda: total(losses(model(features, Draws(0)), config.loss), config.loss)


def theirs(config: Config, features: Tensor) -> tuple[nn.Module, Loss]:
    from omegaconf import OmegaConf
    from videosaur import configuration, models

    clips, (patches, dim) = features.ndim == 4, features.shape[-2:]
    chosen = OmegaConf.merge(configuration.ModelConfig, source_config(config, patches, dim))
    built: Any = models.build(chosen, {"name": "Adam", "lr": config.optim.learning_rate}, {}, {})
    encoder = built.encoder.module if clips else built.encoder
    encoder.backbone = Ready()
    built.to(features.device)
    inputs = {"video" if clips else "image": features.unsqueeze(-3)}

    def loss() -> Tensor:
        value: Tensor = built.compute_loss(built(inputs))[0]
        return value

    return built, loss


def source_config(config: Config, patches: int, dim: int) -> dict[str, Any]:
    """The source's own configuration of the preset, in our preset's sizes."""
    model, loss = config.model, config.loss
    assert isinstance(model, SlotAttentionConfig)
    width, decoder = model.slot_dim, model.decoder
    hidden = [decoder.hidden] * decoder.layers
    parts: dict[str, Any] = {
        "input_type": "image",
        "initializer": {"name": "RandomInit", "n_slots": model.slots, "dim": width},
        "encoder": {
            "backbone": {"name": "nn.Identity"},
            "output_transform": {
                "name": "networks.two_layer_mlp", "inp_dim": dim, "outp_dim": width,
                "hidden_dim": model.projection_hidden or dim, "layer_norm": True,
            },
        },
        "grouper": {
            "name": "SlotAttention", "inp_dim": width, "slot_dim": width, "n_iters": model.iterations,
            "use_mlp": model.slot_mlp_hidden > 0, "hidden_dim": model.slot_mlp_hidden or None,
        },
    }  # fmt: skip
    if model.predictor is None:
        sizes = {"inp_dim": width, "outp_dim": dim, "hidden_dims": hidden, "n_patches": patches}
        return parts | {"decoder": {"name": "MLPDecoder"} | sizes}
    attention = {"dim": width, "n_heads": decoder.heads}
    return parts | {
        "input_type": "video",
        "latent_processor": {"first_step_corrector_args": {"n_iters": model.predictor.first_iterations}},
        "predictor": {"name": "networks.TransformerEncoder", "n_blocks": 1} | attention,
        "decoder": {
            "name": "SlotMixerDecoder", "inp_dim": width, "embed_dim": width, "outp_dim": patches,
            "n_patches": patches,
            "allocator": {
                "name": "TransformerEncoder", "memory_dim": width, "n_blocks": decoder.blocks, **attention,
            },
            "renderer": {
                "name": "MLP", "inp_dim": width, "outp_dim": decoder.hidden, "hidden_dims": hidden[1:],
                "final_activation": True,
            },
            "renderer_dim": decoder.hidden, "use_layer_norms": True, "pos_embed_mode": "add",
        },
        "losses": {
            "loss_timesim": {
                "name": "CrossEntropyLoss", "target_key": "encoder.backbone_features", "remove_last_n_frames": 1,
                "pred_dims": [0, patches],
                "target_transform": {
                    "name": "utils.FeatureTimeSimilarity", "softmax": True, "threshold": 0.0,
                    "temperature": loss.similarity_temperature,
                },
            }
        },
        "loss_weights": {"loss_timesim": loss.temporal_similarity},
    }  # fmt: skip


def stepper(model: nn.Module, loss: Loss, config: Config, fused: bool) -> Callable[[], float]:
    """A job: one step, and steps a second."""
    optimizer = torch.optim.Adam(model.parameters(), config.optim.learning_rate, fused=fused)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1 / (time.perf_counter() - began)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of VideoSAUR's source")
    parser.add_argument("--preset", choices=PRESETS, default="dinosaur")
    parser.add_argument("--batch-size", type=int, default=4, help="frames or clips in a batch")
    parser.add_argument("--side", type=int, default=16, help="patches per side")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout))

    config, device = load_config(args.preset, None, ["data.normalize=none"]), pick_device(args.device)
    shape = (args.batch_size, *([config.data.clip] if config.data.clip > 1 else []), args.side**2, args.dim)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    torch.manual_seed(0)
    built = {"source": theirs(config, features), "ours": ours(config, features)}
    jobs = {name: stepper(*made, config, fused=name == "ours") for name, made in built.items()}
    for job in jobs.values():
        job()  # warms up
    rates = alternate(jobs, args.rounds)
    figures: dict[str, Any] = {
        name: {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "loss": round(float(loss().detach()), 4),
            "seconds": round(1 / statistics.median(rates[name]), 3),
        }
        for name, (model, loss) in built.items()
    }
    figures["speed"] = round(paired_ratio(rates, "ours", "source"), 2)
    report("source", {"preset": args.preset, "shape": list(shape)} | figures)


if __name__ == "__main__":
    main()

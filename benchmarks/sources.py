"""The models of the public sources, built by their checkouts in our presets' sizes, for ready features.

Backbones, which the sources run at every step, are left out. Nothing of a source is in this repository.
"""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from featcache.errors import DataError
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import Config


@dataclass(frozen=True)
class Pass:
    """A training pass: the loss, and by name what led to it."""

    loss: Tensor
    parts: dict[str, Tensor]  # slots (.., K, S), attention (.., K, N), masks (.., K, N), reconstruction (.., N, D)


@dataclass(frozen=True)
class Source:
    """A public repository: what marks its checkout, its presets with what differs from ours, and its models."""

    mark: str  # a path that its checkout alone has
    presets: dict[str, tuple[str, ...]]
    build: Callable[[Config, Tensor], tuple[nn.Module, Callable[[], Pass]]]


def source_of(checkout: Path) -> Source:
    """The source of a checkout, whose modules can be imported from then on. ``DataError`` if it is of no known one."""
    for source in SOURCES:
        if (checkout / source.mark).exists():
            sys.path.insert(0, str(checkout))
            return source
    known = ", ".join(source.mark for source in SOURCES)
    raise DataError(f"{checkout}: no checkout of a known source, which has one of {known}")


class Ready(nn.Module):
    """Stands where a source has a ViT: (B, 1, N, D) ready features to (B, N, D)."""

    def forward(self, features: Tensor) -> Tensor:
        return features.squeeze(1)


def slots_of(config: Config) -> SlotAttentionConfig:
    assert isinstance(config.model, SlotAttentionConfig)
    return config.model


# -- VideoSAUR, SlotContrast ---------------------------------------------------------------------------


def videosaur(config: Config, features: Tensor) -> tuple[nn.Module, Callable[[], Pass]]:
    from videosaur import configuration, models

    return of_videosaur(config, features, configuration.ModelConfig, models.build)


def slotcontrast(config: Config, features: Tensor) -> tuple[nn.Module, Callable[[], Pass]]:
    from slotcontrast import configuration, models

    return of_videosaur(config, features, configuration.ModelConfig, models.build)


def of_videosaur(
    config: Config, features: Tensor, schema: Any, build: Callable[..., Any]
) -> tuple[nn.Module, Callable[[], Pass]]:
    from omegaconf import OmegaConf

    clips, (patches, dim) = features.ndim == 4, features.shape[-2:]
    chosen = OmegaConf.merge(schema, videosaur_config(config, patches, dim))
    built: Any = build(chosen, {"name": "Adam", "lr": config.optim.learning_rate}, {}, {})
    encoder = built.encoder.module if clips else built.encoder
    encoder.backbone = Ready()
    built.to(features.device)
    inputs = {"video" if clips else "image": features.unsqueeze(-3)}

    def step() -> Pass:
        outputs = built(inputs)
        processed, decoded = outputs["processor"], outputs["decoder"]
        loss: Tensor = built.compute_loss(outputs)[0]
        named = {"slots": processed["state"], "attention": processed["corrector"]["masks"]}
        return Pass(loss, named | {"masks": decoded["masks"], "reconstruction": decoded["reconstruction"]})

    return built, step


def videosaur_config(config: Config, patches: int, dim: int) -> dict[str, Any]:
    """The source's own configuration of the preset, in our preset's sizes."""
    model, loss = slots_of(config), config.loss
    width, decoder = model.slot_dim, model.decoder
    hidden = [decoder.hidden] * decoder.layers
    starts = {"gaussian": "RandomInit", "learnt": "FixedLearnedInit"}[model.initializer]
    parts: dict[str, Any] = {
        "input_type": "image",
        "initializer": {"name": starts, "n_slots": model.slots, "dim": width},
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
        "decoder": {
            "name": "MLPDecoder", "inp_dim": width, "outp_dim": dim, "hidden_dims": hidden, "n_patches": patches,
        },
    }  # fmt: skip
    if model.predictor is None:
        return parts
    attention = {"dim": width, "n_heads": model.predictor.heads}
    parts |= {
        "input_type": "video",
        "latent_processor": {"first_step_corrector_args": {"n_iters": model.predictor.first_iterations}},
        "predictor": {"name": "networks.TransformerEncoder", "n_blocks": 1} | attention,
    }
    if decoder.kind == "slot_mixer":
        parts["decoder"] = {
            "name": "SlotMixerDecoder", "inp_dim": width, "embed_dim": width, "outp_dim": patches,
            "n_patches": patches,
            "allocator": {
                "name": "TransformerEncoder", "memory_dim": width, "n_blocks": decoder.blocks, "dim": width,
                "n_heads": decoder.heads,
            },
            "renderer": {
                "name": "MLP", "inp_dim": width, "outp_dim": decoder.hidden, "hidden_dims": hidden[1:],
                "final_activation": True,
            },
            "renderer_dim": decoder.hidden, "use_layer_norms": True, "pos_embed_mode": "add",
        }  # fmt: skip
    losses: dict[str, Any] = {}
    if loss.feature_mse:
        losses["loss_featrec"] = {"name": "MSELoss", "pred_dims": [0, dim]}
    if loss.temporal_similarity:
        losses["loss_timesim"] = {
            "name": "CrossEntropyLoss", "target_key": "encoder.backbone_features", "remove_last_n_frames": 1,
            "pred_dims": [0, patches],
            "target_transform": {
                "name": "utils.FeatureTimeSimilarity", "softmax": True, "threshold": 0.0,
                "temperature": loss.similarity_temperature,
            },
        }  # fmt: skip
    if loss.slot_contrast:
        losses["loss_ss"] = {
            "name": "Slot_Slot_Contrastive_Loss", "pred_key": "processor.state", "batch_contrast": True,
            "temperature": loss.contrast_temperature, "patch_inputs": False, "keep_input_dim": True,
        }  # fmt: skip
    weights = {
        "loss_featrec": loss.feature_mse, "loss_timesim": loss.temporal_similarity, "loss_ss": loss.slot_contrast,
    }  # fmt: skip
    return parts | {"losses": losses, "loss_weights": {name: weights[name] for name in losses}}


# -- the framework of DINOSAUR -------------------------------------------------------------------------


def dinosaur(config: Config, features: Tensor) -> tuple[nn.Module, Callable[[], Pass]]:
    """Its parts, which its own configuration puts together by Hydra (configs/experiment/projects/bridging/dinosaur)."""
    from functools import partial

    from ocl import conditioning, decoding, losses, neural_networks, perceptual_grouping
    from ocl.typing import FeatureExtractorOutput

    model = slots_of(config)
    batch, patches, dim = features.shape
    width, decoder = model.slot_dim, model.decoder
    mlp = neural_networks.build_two_layer_mlp
    if decoder.kind == "mlp":
        build = partial(neural_networks.build_mlp, features=[decoder.hidden] * decoder.layers)
        decode: Any = decoding.PatchDecoder(width, dim, patches, build)
    else:
        build = partial(neural_networks.build_transformer_decoder, n_layers=decoder.blocks, n_heads=decoder.heads)
        decode = decoding.AutoregressivePatchDecoder(
            width, dim, patches, build, decoder_cond_dim=dim, use_input_transform=True
        )
    parts = {
        "conditioning": conditioning.RandomConditioning(width, model.slots),
        "project": mlp(dim, width, model.projection_hidden or dim, initial_layer_norm=True),
        "perceptual_grouping": perceptual_grouping.SlotAttentionGrouping(
            width, width, iters=model.iterations,
            ff_mlp=mlp(width, width, model.slot_mlp_hidden, initial_layer_norm=True, residual=True),
        ),
        "object_decoder": decode,
    }  # fmt: skip
    built = nn.ModuleDict(parts).to(features.device)
    measure = losses.ReconstructionLoss("mse")

    def step() -> Pass:
        first = built["conditioning"](batch)
        given = FeatureExtractorOutput(built["project"](features), None, None)
        grouped = built["perceptual_grouping"](given, first)
        attention = grouped.feature_attributions
        read = {"target": features} if decoder.kind == "mlp" else {"target": features, "masks": attention}
        decoded = built["object_decoder"](grouped.objects, **read)
        named = {"slots": grouped.objects, "attention": attention, "reconstruction": decoded.reconstruction}
        if decoder.kind == "mlp":  # the autoregressive decoder gives its input
            named["masks"] = decoded.masks
        value = measure(decoded.reconstruction, features)
        return Pass(value[0] if isinstance(value, tuple) else value, named)

    return built, step


# -- SPOT ----------------------------------------------------------------------------------------------


def spot(config: Config, features: Tensor) -> tuple[nn.Module, Callable[[], Pass]]:
    with contextlib.redirect_stdout(io.StringIO()):
        import spot

    model = slots_of(config)
    (batch, patches), decoder = features.shape[:2], model.decoder

    class OfReady(spot.SPOT):  # type: ignore[misc, name-defined, unused-ignore]
        def forward_encoder(self, x: Tensor, encoder: nn.Module) -> Tensor:
            return x if x.ndim == 3 else features

    args = Namespace(
        which_encoder="ready", encoder_final_norm=False, finetune_blocks_after=100, img_channels=3,
        image_size=round(patches**0.5), num_iterations=model.iterations, num_slots=model.slots,
        slot_size=model.slot_dim, mlp_hidden_size=model.slot_mlp_hidden, pos_channels=4,
        truncate="bi-level" if model.gradient == "bilevel" else "none",
        init_method="embedding" if model.initializer == "learnt" else "shared_gaussian",
        cappa=-1, train_permutations="random" if decoder.permuted else "standard", eval_permutations="standard",
        dec_type="transformer", use_slot_proj=True, num_dec_blocks=decoder.blocks, max_tokens=patches,
        num_heads=decoder.heads, num_cross_heads=None, dropout=0.0,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        built = OfReady(nn.Module(), args).to(features.device)

    def step() -> Pass:
        image = features.new_zeros(batch, 3, args.image_size, args.image_size)
        loss, attention, masks, slots, decoded, _ = built(image)
        named = {"slots": slots, "attention": attention.flatten(2), "masks": masks.flatten(2)}
        return Pass(loss, named | {"reconstruction": decoded})

    return built, step


SOURCES = (
    Source("videosaur", {"dinosaur": ("model.gru_hidden=normalised",), "videosaur": ()}, videosaur),
    Source("slotcontrast", {"slotcontrast": ()}, slotcontrast),
    Source("ocl", {"dinosaur": (), "dinosaur-ar": ()}, dinosaur),
    Source("spot.py", {"spot": ()}, spot),
)

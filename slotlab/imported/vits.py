"""Which backbone a checkpoint was trained on, by the parameters of its ViT."""

from __future__ import annotations

from slotlab.imported.published import Published

# Patch, width, and kind -> backbone. Others have the same shapes (MAE, MSN ...): these are what the sources used.
_KNOWN = {
    (14, 384, "dinov2"): "dinov2_vits14",
    (14, 384, "registers"): "dinov2_vits14_reg",
    (14, 768, "dinov2"): "dinov2_vitb14",
    (14, 768, "registers"): "timm:vit_base_patch14_reg4_dinov2.lvd142m",
    (16, 384, "dino"): "dino_vits16",
    (16, 768, "dino"): "dino_vitb16",
    (8, 384, "dino"): "timm:vit_small_patch8_224.dino",
    (8, 768, "dino"): "timm:vit_base_patch8_224.dino",
}


def backbone_of(published: Published, start: str) -> str | None:
    """The backbone whose parameters' names begin with ``start``; None if there are none, or of no known shape."""
    embedding = published.tensors.get(f"{start}patch_embed.proj.weight")
    if embedding is None or embedding.ndim != 4:
        return None
    scaled = published.has(f"{start}blocks.0.ls1.")
    registers = f"{start}reg_token" in published.tensors or f"{start}register_tokens" in published.tensors
    kind = "registers" if registers else "dinov2" if scaled else "dino"
    return _KNOWN.get((embedding.shape[-1], embedding.shape[0], kind))

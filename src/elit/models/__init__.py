"""Backbones, the registry of named models, and models on disk."""

from elit.models.base import Model
from elit.models.compiled import compile, compile_layers
from elit.models.dfm import DFM, DFMConfig
from elit.models.dit import DiT, DiTConfig
from elit.models.hdit import HDiT, HDiTConfig
from elit.models.mmdit import MMDiT, MMDiTConfig
from elit.models.registry import config_for, create, names
from elit.models.transformer import Core, Effect, Encoded, Stream, Transformer, TransformerConfig
from elit.models.uvit import UViT, UViTConfig

__all__ = [
    "DFM",
    "Core",
    "DFMConfig",
    "DiT",
    "DiTConfig",
    "Effect",
    "Encoded",
    "HDiT",
    "HDiTConfig",
    "MMDiT",
    "MMDiTConfig",
    "Model",
    "Stream",
    "Transformer",
    "TransformerConfig",
    "UViT",
    "UViTConfig",
    "compile",
    "compile_layers",
    "config_for",
    "create",
    "names",
]

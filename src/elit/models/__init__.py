"""Backbones, the registry of named models, and models on disk."""

from elit.models.base import Model
from elit.models.dfm import DFM, DFMConfig
from elit.models.dit import DiT, DiTConfig
from elit.models.registry import config_for, create, names

__all__ = ["DFM", "DFMConfig", "DiT", "DiTConfig", "Model", "config_for", "create", "names"]

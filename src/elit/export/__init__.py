"""Models as one file for other runtimes, whose number of latents is still a knob."""

from elit.export.loaded import ExportedModel, is_exported, load_exported
from elit.export.metadata import Format, Metadata, Precision
from elit.export.write import export

__all__ = ["ExportedModel", "Format", "Metadata", "Precision", "export", "is_exported", "load_exported"]

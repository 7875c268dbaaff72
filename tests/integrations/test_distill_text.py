"""Bases of captions: PixArt, with embedded captions and latents that `elit prepare encode` made."""

"""Ironclip: CLIP that is hard to fool, and honest about how hard."""

__version__ = "0.1.0"

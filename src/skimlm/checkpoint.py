"""Opening and loading models under a short name."""

from skimlm.models.checkpoint import Checkpoint, load, open_checkpoint

__all__ = ["Checkpoint", "load", "open_checkpoint"]

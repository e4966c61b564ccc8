"""Publishing on the Hub: what of a run is published and the uploads (publish.py), and the model card (card.py)."""

from .publish import Uploads, push

__all__ = ["Uploads", "push"]

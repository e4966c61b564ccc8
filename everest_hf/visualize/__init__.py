"""Pictures: tokens that a model keeps (tokens.py), moving ones (animation.py), and charts of figures (charts.py)."""

from .animation import kept_token_panels, reconstruction_panels, write_animation
from .charts import draw_confusion, draw_curves, draw_keep_ratios
from .tokens import draw_kept_tokens, draw_reconstruction, take_slots

__all__ = [
    "draw_confusion",
    "draw_curves",
    "draw_keep_ratios",
    "draw_kept_tokens",
    "draw_reconstruction",
    "kept_token_panels",
    "reconstruction_panels",
    "take_slots",
    "write_animation",
]

"""Pictures: the tokens that a model keeps (tokens.py), the same in motion (animation.py), and charts (charts.py)."""

from .animation import kept_token_panels, reconstruction_panels, write_animation, write_windows
from .charts import draw_confusion, draw_curves, draw_keep_ratios
from .tokens import draw_kept_tokens, draw_reconstruction, frame_titles, take_slots

__all__ = [
    "draw_confusion",
    "draw_curves",
    "draw_keep_ratios",
    "draw_kept_tokens",
    "draw_reconstruction",
    "frame_titles",
    "kept_token_panels",
    "reconstruction_panels",
    "take_slots",
    "write_animation",
    "write_windows",
]

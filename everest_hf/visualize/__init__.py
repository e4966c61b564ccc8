"""Pictures: the tokens that a model keeps (tokens.py), the same in motion (animation.py), clips in strips
(contact_sheet.py), charts (charts.py), and the classes of a video over
its time (timeline.py).
"""

from .animation import kept_token_panels, reconstruction_panels, write_animation, write_windows
from .charts import draw_comparison, draw_confusion, draw_curves, draw_keep_ratios
from .contact_sheet import write_contact_sheet
from .timeline import draw_timeline
from .tokens import draw_kept_tokens, draw_reconstruction, frame_titles, grey_out, take_slots, token_mask

__all__ = [
    "draw_comparison",
    "draw_confusion",
    "draw_curves",
    "draw_keep_ratios",
    "draw_kept_tokens",
    "draw_reconstruction",
    "draw_timeline",
    "frame_titles",
    "grey_out",
    "kept_token_panels",
    "reconstruction_panels",
    "take_slots",
    "token_mask",
    "write_animation",
    "write_contact_sheet",
    "write_windows",
]

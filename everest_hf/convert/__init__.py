"""Conversion of VideoMAE and official EVEREST checkpoints to EVEREST for Transformers.

Two kinds of source are read (sources.py): the .pth files of the official VideoMAE and EVEREST code, whose sizes are read
off the shapes, and VideoMAE checkpoints of Transformers (a folder or a Hub id), whose config.json is kept. Both come down
to one table of names (names.py); every key is used, set aside by name, or an error (checkpoint.py). The way back, to a
VideoMAE of Transformers, is in export.py.
"""

from .checkpoint import ConversionReport, convert_checkpoint, load_converted
from .export import ExportReport, convert_to_videomae
from .sources import read_source

__all__ = [
    "ConversionReport",
    "ExportReport",
    "convert_checkpoint",
    "convert_to_videomae",
    "load_converted",
    "read_source",
]

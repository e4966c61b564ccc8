"""Conversion of VideoMAE and official EVEREST checkpoints to EVEREST for Transformers.

There are two kinds of source (sources.py). The .pth files of the official VideoMAE and EVEREST code tell their sizes by
the shapes of their weights. VideoMAE checkpoints of Transformers, a folder or a Hub id, tell them in config.json. Tables
of names (names.py) rename the weights of both. Each key is used, set aside by name, or an error (checkpoint.py). export.py
makes a VideoMAE of Transformers again.
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

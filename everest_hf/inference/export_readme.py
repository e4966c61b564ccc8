"""The README beside an exported model: what the file takes and gives, and a program that runs it on a video."""

from string import Template

from ..configuration_everest import EverestConfig
from ..video_processing_everest import EverestVideoProcessor

_README = Template(
    """# $file

$what It was exported by `everest-hf export`, and gives what the model gives to 1e-4, on a CPU.

| | name | shape |
|---|---|---|
| in | `pixel_values` | float32 (clips, $frames, 3, $height, $width): RGB, normalised |
| out | `$output` | $shape |
| out | `kept_ids` | int64 (clips, kept tokens) |

This program needs no more than `pip install $packages`. $sampling

```python
import json
import sys

import av
import numpy as np
$imports
from PIL import Image

with open("video_preprocessor_config.json") as settings, open("config.json") as config:
    settings, config = json.load(settings), json.load(config)
with av.open(sys.argv[1]) as video:
    pictures = [frame.to_image() for frame in video.decode(video=0)]
n, (width, height) = len(pictures), pictures[0].size
places = $places
scale = max($height / height, $width / width)
size = max($width, round(width * scale)), max($height, round(height * scale))
left, top = (size[0] - $width) // 2, (size[1] - $height) // 2
box = left, top, left + $width, top + $height
pictures = [pictures[i].resize(size, Image.Resampling.BILINEAR).crop(box) for i in places]
frames = np.stack(pictures).transpose(0, 3, 1, 2) / 255  # (frames, 3, height, width)
mean, std = (np.reshape(settings[name], (3, 1, 1)) for name in ("image_mean", "image_std"))
pixel_values = ((frames - mean) / std)[None].astype(np.float32)
$run
$answer
```

`video_preprocessor_config.json` holds all settings of the video processor, `config.json` those of the model.
"""
)
_PROGRAMS = {
    "onnx": (
        "av numpy onnxruntime pillow",
        "import onnxruntime",
        'session = onnxruntime.InferenceSession("$file")\n'
        'output, kept_ids = session.run(None, {"pixel_values": pixel_values})',
    ),
    "pt2": (
        "av numpy pillow torch",
        "import torch",
        'program = torch.export.load("$file").module()\n'
        "output, kept_ids = (value.detach().numpy() for value in program(torch.from_numpy(pixel_values)))",
    ),
}
_LABELS = 'print(config["id2label"][str(output[0].argmax())], output[0].max())'
_FEATURES = "print(output.mean(axis=1))  # a feature vector for each clip"


def readme_of(config: EverestConfig, processor: EverestVideoProcessor, output: str, file: str) -> str:
    """Return the README of a file; output: the name of what it gives."""
    height, width = config.frame_size
    packages, imports, run = _PROGRAMS[file.rpartition(".")[2]]
    is_classifier = output == "logits"
    return _README.substitute(
        file=file,
        what="A video classifier." if is_classifier else "A video encoder.",
        frames=config.num_input_frames,
        height=height,
        width=width,
        output=output,
        shape=f"float32 (clips, {config.num_labels})"
        if is_classifier
        else f"float32 (clips, kept tokens, {config.hidden_size})",
        packages=packages,
        imports=imports,
        places=_places_of(processor),
        sampling=_sampling_of(processor),
        run=Template(run).substitute(file=file),
        answer=_LABELS if is_classifier else _FEATURES,
    )


def _places_of(processor: EverestVideoProcessor) -> str:
    """Return an expression for the numbers of the frames of the centre clip; see `everest_hf.video.frame_indices`."""
    count = processor.num_input_frames or processor.num_frames
    if processor.frame_sampling == "segment":
        return f"[min(int((i + 0.5) * n / {count}) if n >= {count} else i, n - 1) for i in range({count})]"
    span = processor.num_frames * processor.frame_step
    last = (count - 1) * span // count
    return f"[min(round(max(0, n - 1 - {last}) / 2) + i * {span} // {count}, n - 1) for i in range({count})]"


def _sampling_of(processor: EverestVideoProcessor) -> str:
    count = processor.num_input_frames or processor.num_frames
    if processor.frame_sampling == "segment":
        return f"It takes the middle frame of each of {count} equal parts of a video, whose pixels are not turned."
    return f"It takes {count} frames from the middle of a video, whose pixels are not turned."

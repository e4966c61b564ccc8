"""The API reference of the site shows docstrings as they are meant."""

from pathlib import Path

import pytest

pytest.importorskip("griffe", reason="the site needs the extra docs")

DOCSTRING = """Read a clip.

source: a path, or the bytes
    of a file. name: what errors call it.
size, step: of the clip.
other: nobody's argument.

Raises:
    ValueError: size is 0.

>>> read("a.mp4")
1
"""
SHOWN = """Read a clip.


- `source`: a path, or the bytes
    of a file. name: what errors call it.
- `size`, `step`: of the clip.
other: nobody's argument.

Raises:
    ValueError: size is 0.

```python
>>> read("a.mp4")
1
```
"""
FIELDS = """A model.

Input
    size: of a frame,
    in pixels. step: of a clip.
Output
    heads, layers (as everywhere).
    norm: which.
"""
SHOWN_FIELDS = """A model.


**Input**


- `size`: of a frame,
    in pixels. step: of a clip.

**Output**

heads, layers (as everywhere).

- `norm`: which."""


def test_lines_about_arguments_are_items_of_lists(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "docs")
    from docstrings import as_lists

    assert as_lists(DOCSTRING, {"source", "name", "size", "step"}) == SHOWN
    assert as_lists(FIELDS, {"size", "step", "norm"}) == SHOWN_FIELDS

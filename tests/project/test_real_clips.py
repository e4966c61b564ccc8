"""The study of real clips: that they keep the share that they are to, and that the extremes are drawn."""

import json

import pytest
import real_clips
from helpers.videos import real_clips as real_videos
from PIL import Image


@pytest.mark.slow
def test_real_clips_share_their_tokens_unequally(tmp_path, monkeypatch, capsys):
    real_videos()  # skips where there are none
    out, picture = tmp_path / "found.json", tmp_path / "found.jpg"
    monkeypatch.setattr("sys.argv", ["real_clips.py", "--out", str(out), "--picture", str(picture)])
    real_clips.main()
    found = json.loads(out.read_text())
    for selection in ("motion", "compensated"):
        spread, counts = found[selection]["spread"], found[selection]["tokens"].values()
        assert spread["mean"] == pytest.approx(0.3, abs=0.01)
        assert len(counts) == 16
        assert spread["least"] == min(counts) / 1568 < 0.15 < 0.6 < spread["most"] == max(counts) / 1568
    with Image.open(picture) as image:
        assert image.height > image.width
    assert "| compensated | 0.30 |" in capsys.readouterr().out

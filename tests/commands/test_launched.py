"""Commands that several processes of a launcher share: each takes a part, there is one result, and one of them speaks."""

from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT, launch, start_ranks, train_on
from helpers.tiny import tiny_config
from helpers.videos import bad_files, write_clip, write_list
from safetensors.torch import load_file

from everest_hf import EverestForPreTraining, EverestVideoProcessor, cli, distributed

PROGRAM = ROOT / "everest_hf_cli.py"
PREPARE = ("prepare", "list.txt", "--short-side", 24)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with five videos and one that is bad, in a list."""
    folder = tmp_path_factory.mktemp("place")
    videos = [write_clip(folder / "in" / f"{i}.mp4", seed=i) for i in range(5)]
    videos.append(bad_files(folder / "in")["text"])
    write_list(folder / "list.txt", [(path, i % 2) for i, path in enumerate(videos)])
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("everest-hf: error: ")]


@pytest.mark.parametrize("more", [(), ("--shards", 3)])
def test_videos_are_prepared_in_parts_that_make_one_result(place, more):
    out = "files" if more else "videos"
    results = train_on(2, *PREPARE, out, *more, cwd=place, script=PROGRAM)
    again = train_on(2, *PREPARE, out, *more, cwd=place, script=PROGRAM)
    count = f"{3 if more else 5} {out}"
    for (first, second), counts in ((results, f"{count} written, 0"), (again, f"0 {out} written, {count[0]}")):
        assert [first.returncode, second.stdout, second.stderr] == [1, "", ""]
        assert f"{out}: {counts} there already" in first.stdout
        assert first.stdout.count("1 unreadable") == 1
        (error,) = errors_in(first.stderr)
        assert f"{place}/in/text.mp4: cannot be decoded" in error
    alone = (PREPARE[0], place / PREPARE[1], *PREPARE[2:], place / f"{out} of one", *more)
    assert cli.main([str(part) for part in alone]) == 1
    assert files_in(place / out) == files_in(place / f"{out} of one")


def test_what_fails_in_one_process_is_said_once_by_the_main_one(place):
    (place / "blocked" / "in" / "1.mp4" / "in the way").mkdir(parents=True)  # of what the second process writes
    main, other = start_ranks(2, *PREPARE, "blocked", cwd=place, script=PROGRAM)
    result = main.wait()
    other.process.terminate()  # as a launcher does
    assert result.returncode == 1
    assert errors_in(result.stderr) == ["everest-hf: error: blocked/in/1.mp4: Is a directory"]
    result = other.wait()
    assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prepare", "list.txt", "out", "--shard", "1/2"],
            "--shard is given, and 2 processes are launched, which take",
        ),
        (["embed", "list.txt", "out.parquet", "--shard", "1/2"], "--shard is given, and 2 processes are launched"),
        (
            ["embed", "list.txt", "out", "--windows"],
            "--windows is for one process, and 2 are launched; start it without",
        ),
    ],
)
def test_what_processes_cannot_share(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(distributed, "TIME_TO_SPEAK", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(arguments) == 1
    (error,) = errors_in(capsys.readouterr().err)
    assert message in error
    monkeypatch.setenv("RANK", "1")
    for command, code in ((arguments, 1), (["no such command"], 2)):
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == code
        assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_launcher_embeds_as_one_process_does(place, monkeypatch):
    torch.manual_seed(0)
    EverestForPreTraining(tiny_config()).save_pretrained(place / "model")
    EverestVideoProcessor.from_config(tiny_config(), frame_step=2).save_pretrained(place / "model")
    write_list(
        place / "many.txt", [(place / "in" / ("text.mp4" if i == 130 else f"{i % 5}.mp4"),) for i in range(150)]
    )
    embed = ["embed", "many.txt", "--model", "model", "--workers", 1]
    how = {"cwd": place, "processes": 2, "program": ("-m", "everest_hf.cli")}
    done = launch(*embed, "two.safetensors", **how)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["two.safetensors: 32 values for each of 149 videos"]
    (error,) = errors_in(done.stderr)
    assert f"{place}/in/text.mp4: cannot be decoded" in error
    monkeypatch.chdir(place)
    assert cli.main([str(part) for part in (*embed, "one.safetensors")]) == 1
    one, two = (load_file(place / f"{name}.safetensors") for name in ("one", "two"))
    assert one["index"].tolist() == two["index"].tolist()
    torch.testing.assert_close(one["embeddings"], two["embeddings"], atol=1e-5, rtol=1e-5)
    refused = launch(*embed, "other.safetensors", "--batch-size", 0, **how)
    assert refused.returncode == 1
    assert errors_in(refused.stderr) == ["everest-hf: error: --batch-size is 0; it must be at least 1"]

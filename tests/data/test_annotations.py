"""everest-hf make-list on annotations in their official forms."""

import csv
import json
from pathlib import Path

import pytest
from helpers.videos import write_clip

from everest_hf import cli
from everest_hf.data import class_names_of, load_videos

UCF101 = {
    "classInd.txt": "1 ApplyEyeMakeup\r\n2 Archery\r\n",
    "trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nArchery/v_Archery_g08_c02.avi 2\r\n",
    "testlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\nArchery/v_Archery_g01_c01.avi\r\n",
    "trainlist02.txt": "Archery/v_Archery_g01_c01.avi 2\n",
    "testlist02.txt": "Archery/v_Archery_g08_c02.avi\n",
}
HMDB51 = {
    "brush_hair_test_split1.txt": "#1_[a] & b!_brush_hair_f_nm_np1_ri_goo_0.avi 1 \nc_brush_hair_u_cm_np2_ri_goo_1.avi 2 \n",
    "wave_test_split1.txt": "d_wave_f_nm_np1_ri_goo_0.avi 1 \ne_wave_f_nm_np1_ri_goo_1.avi 0 \nf_wave_f_nm_np1_ri_goo_2.avi 2 \n",
    "wave_test_split2.txt": "d_wave_f_nm_np1_ri_goo_0.avi 2 \n",
}
KINETICS = {
    "train.csv": "label,youtube_id,time_start,time_end,split\nclay pottery making,--abc,5,15,train\n"
    '"dancing, fast",-d_1,1234567,1234577,train\nzumba,gone,1,11,train\n',
    "validate.csv": "label,youtube_id,time_start,time_end,split\nclay pottery making,xyz,0,10,validate\n",
}
SSV2 = {
    "something-something-v2-labels.json": json.dumps({"Holding something": "0", "Moving something up": "1"}),
    "something-something-v2-train.json": json.dumps(
        [
            {"id": "78687", "label": "holding a pot", "template": "Holding [something]", "placeholders": ["a pot"]},
            {"id": "42326", "label": "moving it up", "template": "Moving [something] up", "placeholders": ["it"]},
        ]
    ),
    "something-something-v2-validation.json": json.dumps(
        [{"id": "7", "label": "holding x", "template": "Holding [something]", "placeholders": ["x"]}]
    ),
    "something-something-v2-test.json": json.dumps([{"id": "8"}]),
}


def oscc_clip(number: int, change: bool, start: float, **others) -> dict:
    return {
        "unique_id": f"u{number}",
        "video_uid": f"v{number % 2}",
        "state_change": change,
        "parent_start_sec": start,
        "parent_end_sec": start + 0.4,
        "parent_start_frame": round(start * 30),
        **others,
    }


OSCC = {
    "fho_oscc-pnr_train.json": json.dumps(
        {"version": "v1", "clips": [oscc_clip(0, True, 0.2), oscc_clip(1, False, 0), oscc_clip(2, False, 1.2)]}
    ),
    "fho_oscc-pnr_val.json": json.dumps({"version": "v1", "clips": [oscc_clip(3, True, 0.8)]}),
}
FILES = {
    "ucf101": (UCF101, ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi",
                        "Archery/v_Archery_g08_c02.avi", "Archery/v_Archery_g01_c01.avi"]),
    "hmdb51": (HMDB51, ["brush_hair/#1_[a] & b!_brush_hair_f_nm_np1_ri_goo_0.avi", "wave/d_wave_f_nm_np1_ri_goo_0.avi",
                        "brush_hair/c_brush_hair_u_cm_np2_ri_goo_1.avi", "wave/f_wave_f_nm_np1_ri_goo_2.avi"]),
    "kinetics": (KINETICS, ["train/clay_pottery_making/--abc_000005_000015.mp4", "train/-d_1_1234567_1234577.mp4",
                            "val/clay pottery making/xyz_000000_000010.mp4"]),
    "ssv2": (SSV2, ["78687.webm", "42326.webm", "7.webm"]),
    "oscc": (OSCC, ["full_scale/v0.mp4", "full_scale/v1.mp4"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    """A video of two seconds. Its name says nothing to the decoder, whatever it is copied to."""
    return write_clip(tmp_path_factory.mktemp("any") / "any.mp4", num_frames=50, height=32, width=32).read_bytes()


@pytest.fixture
def place(tmp_path, video):
    """A function that writes the annotations and videos of a data set, and returns their folders."""

    def write(kind: str, **changed: str) -> tuple[Path, Path]:
        annotations, videos = FILES[kind]
        for name, text in {**annotations, **changed}.items():
            path = tmp_path / "annotations" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
        for name in videos:
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(video)
        return tmp_path / "annotations", tmp_path / "videos"

    return write


def run(capsys, kind, place, *options) -> tuple[int, str, str]:
    annotations, videos = place
    code = cli.main(["make-list", kind, str(annotations), str(videos), str(videos.parent / "data"), *options])
    return (code, *capsys.readouterr())


def lines_of(place, part) -> list[list[str]]:
    with (place[1].parent / "data" / f"{part}.csv").open(newline="") as file:
        return list(csv.reader(file))


def labels_of(place, part) -> list[str]:
    rows = load_videos(place[1].parent / "data" / f"{part}.csv")
    return [class_names_of(rows)[label] for label in rows["label"]]


def test_ucf101_and_its_splits(place, capsys):
    folders = place("ucf101")
    code, out, _ = run(capsys, "ucf101", folders)
    assert code == 0
    assert f"{folders[1].parent}/data/train.csv: 2 videos\n" in out
    assert "missing" not in out
    assert lines_of(folders, "train") == [
        ["video", "label"],
        ["../videos/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "ApplyEyeMakeup"],
        ["../videos/Archery/v_Archery_g08_c02.avi", "Archery"],
    ]
    assert labels_of(folders, "val") == ["ApplyEyeMakeup", "Archery"]
    assert run(capsys, "ucf101", folders, "--split", "2")[2].endswith(
        "train.csv: is there already; overwrite replaces it\n"
    )
    assert run(capsys, "ucf101", folders, "--split", "2", "--overwrite")[0] == 0
    assert [lines_of(folders, part)[1][0][-11:-4] for part in ("train", "val")] == ["g01_c01", "g08_c02"]


def test_hmdb51_with_odd_names_and_unused_videos(place, capsys):
    folders = place("hmdb51")
    assert run(capsys, "hmdb51", folders)[0] == 0
    assert labels_of(folders, "train") == ["brush_hair", "wave"]
    assert lines_of(folders, "train")[1][0] == "../videos/brush_hair/#1_[a] & b!_brush_hair_f_nm_np1_ri_goo_0.avi"
    assert labels_of(folders, "val") == ["brush_hair", "wave"]


def test_kinetics_in_any_folders_with_missing_videos(place, capsys):
    folders = place("kinetics")
    code, out, _ = run(capsys, "kinetics", folders)
    assert code == 0
    assert f"  1 of 3 are missing below {folders[1]}: gone_000001_000011\n" in out
    assert labels_of(folders, "train") == ["clay pottery making", "dancing, fast"]
    assert labels_of(folders, "val") == ["clay pottery making"]
    code, out, _ = run(capsys, "kinetics", (folders[0] / "validate.csv", folders[1]), "--overwrite")
    assert code == 0
    assert out.count("\n") == 1


def test_something_something_has_the_templates_as_classes(place, capsys):
    folders = place("ssv2")
    assert run(capsys, "ssv2", folders)[0] == 0
    assert lines_of(folders, "train")[1:] == [
        ["../videos/78687.webm", "Holding something"],
        ["../videos/42326.webm", "Moving something up"],
    ]
    assert labels_of(folders, "val") == ["Holding something"]


def test_oscc_becomes_segments_of_long_videos(place, capsys):
    folders = place("oscc")
    assert run(capsys, "oscc", folders)[0] == 0
    assert lines_of(folders, "train") == [
        ["video", "start", "end", "label"],
        ["../videos/full_scale/v0.mp4", "0.2", "0.6000000000000001", "state change"],
        ["../videos/full_scale/v1.mp4", "0.0", "0.4", "no state change"],
        ["../videos/full_scale/v0.mp4", "1.2", "1.6", "no state change"],
    ]
    rows = load_videos(folders[1].parent / "data" / "train.csv")
    assert rows["label"][:] == [1, 0, 0]
    assert rows["start"][:] == [0.2, 0, 1.2]


def test_oscc_with_clips_that_were_cut_before(place, capsys, video):
    folders = place("oscc")
    (folders[1] / "u1.mp4").write_bytes(video)
    assert run(capsys, "oscc", folders)[0] == 0
    assert lines_of(folders, "train")[2] == ["../videos/u1.mp4", "", "", "no state change"]
    rows = load_videos(folders[1].parent / "data" / "train.csv")
    assert rows["start"][:] == [0.2, None, 1.2]


KINETICS_HEADER = "label,youtube_id,time_start,time_end,split\n"


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        ("ucf101", "trainlist01.txt", "Archery/v_Archery_g08_c02.avi 1\n", "trainlist01.txt:1: the label 1 is 'ApplyEyeMakeup' in classInd.txt, whose numbers count from 1, and not 'Archery'"),
        ("ucf101", "trainlist01.txt", "Archery/v_Archery_g08_c02.avi 2\nv_x.avi\n", "trainlist01.txt:2: 'v_x.avi' is not 'ApplyEyeMakeup/v_"),
        ("ucf101", "testlist01.txt", "Diving/v_Diving_g01_c01.avi\n", "testlist01.txt:1: the class 'Diving' is not in classInd.txt"),
        ("ucf101", "classInd.txt", "ApplyEyeMakeup 1\n", "classInd.txt:1: 'ApplyEyeMakeup 1' is not '1 ApplyEyeMakeup'"),
        ("hmdb51", "wave_test_split1.txt", "d_wave.avi 3\n", "wave_test_split1.txt:1: 'd_wave.avi 3' is not 'name.avi 1', with 0 for unused"),
        ("kinetics", "train.csv", "label,id\nx,y\n", "train.csv:1: has no field youtube_id; Kinetics' csv begins with label,youtube_id"),
        ("kinetics", "train.csv", KINETICS_HEADER + "x,y,a,3,train\n", "train.csv:2: time_start is 'a'; it must be whole seconds"),
        ("kinetics", "train.csv", KINETICS_HEADER + "x,y,1,3,dev\n", "train.csv:2: split is 'dev'; it must be one of train, val"),
        ("ssv2", "something-something-v2-train.json", '[{"id": "1", "template": "Eating [something]"}]', "train.json: id 1: the template 'Eating something' is not in something-something-v2-labels.json"),
        ("ssv2", "something-something-v2-train.json", '[{"id": 1}]', "train.json: id is 1; it must be text"),
        ("ssv2", "something-something-v2-train.json", '[\n{"id": }]', "train.json:2: not JSON: Expecting value, in column 8"),
        ("oscc", "fho_oscc-pnr_train.json", '{"clips": [{"unique_id": "u", "state_change": 1}]}', "train.json: clip 0: state_change is 1; it must be true or false"),
        ("oscc", "fho_oscc-pnr_val.json", json.dumps([oscc_clip(1, True, 1, parent_end_sec=0.5)]), "val.json: clip 0: parent_start_sec is 1 and parent_end_sec 0.5; the end must come after"),
    ],
)  # fmt: skip
def test_near_misses_name_file_field_and_the_fix(place, capsys, kind, name, text, message):
    folders = place(kind, **{name: text})
    code, out, err = run(capsys, kind, folders)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (folders[1].parent / "data").exists()


def test_what_is_not_there(place, capsys, tmp_path):
    folders = place("ucf101")
    (folders[0] / "testlist01.txt").unlink()
    assert f"{folders[0]}: has no testlist01.txt\n" in run(capsys, "ucf101", folders)[2]
    assert f"{folders[0]}: has no trainlist03.txt\n" in run(capsys, "ucf101", folders, "--split", "3")[2]
    assert "has no file such as brush_hair_test_split1.txt" in run(capsys, "hmdb51", folders)[2]
    assert (
        "expected the folder with classInd.txt" in run(capsys, "ucf101", (folders[0] / "classInd.txt", folders[1]))[2]
    )
    assert "has no file for *labels.json; there must be one" in run(capsys, "ssv2", folders)[2]
    assert "split is 2, but ssv2 has one split alone" in run(capsys, "ssv2", folders, "--split", "2")[2]
    (tmp_path / "empty").mkdir()
    message = f"{tmp_path}/empty: has none of the 1 videos of train, such as v_Archery_g01_c01"
    assert message in run(capsys, "ucf101", (folders[0], tmp_path / "empty"), "--split", "2")[2]


def test_two_files_of_one_name_are_told_apart_by_their_class(place, capsys, video):
    folders = place("ucf101")
    (folders[1] / "other").mkdir()
    copy = folders[1] / "other" / "v_Archery_g08_c02.avi"
    copy.write_bytes(video)
    assert run(capsys, "ucf101", folders)[0] == 0
    assert lines_of(folders, "train")[2][0] == "../videos/Archery/v_Archery_g08_c02.avi"
    (folders[1] / "Archery" / copy.name).rename(folders[1] / copy.name)
    assert "have one name, and nothing tells which is meant" in run(capsys, "ucf101", folders, "--overwrite")[2]

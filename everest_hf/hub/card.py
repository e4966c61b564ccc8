"""The model card of a checkpoint: the template model_card.md, filled in with what is known."""

import os
import re
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_everest import EverestConfig
from ..cost import Use, clip_cost
from ..evaluation.few_shot import DRAWS
from ..evaluation.report import SPREAD, with_spread
from ..files import packaged
from ..training.recipe import Recipe
from ..training.run import Run

CARD = "README.md"
TEMPLATE = packaged("model_card.md")
CLASSIFIER = "EverestForVideoClassification"
TAGS = ["video", "masked-autoencoder", "self-supervised-learning", "everest"]
# Fields that the card names in other places, and fields that mean nothing outside of the run.
PATHS = ("train", "val", "data_root", "model", "output_dir")
NOT_SETTINGS = ("task", *PATHS, "overwrite", "push_to_hub", "num_workers")
TASK_NAMES = {"pretrain": "pre-training", "finetune": "fine-tuning", "probe": "probing, with the encoder frozen"}
# The Hub's identifier of a figure, and its name for people. Other figures keep their own name for both.
FIGURES = {
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("accuracy", "top-5 accuracy"),
    "mean_class_accuracy": ("accuracy", "mean accuracy over the classes"),
    "map": ("mean_average_precision", "mean average precision"),
}
MODELS = {
    CLASSIFIER: ("AutoModelForVideoClassification", "A video classifier"),
    "EverestForPreTraining": ("AutoModelForPreTraining", "A pre-trained masked video autoencoder, to be fine-tuned"),
    "EverestModel": ("AutoModel", "A video encoder"),
}
# What learns from few labels, on the features.
FEW_SHOT = {"linear": "a linear classifier", "knn": "nearest neighbours"}
# Figures of an evaluation by name, if there was one.
Figures = dict[str, float] | None
USES = {
    CLASSIFIER: """with torch.no_grad():
    logits = model(pixel_values).logits  # keep_ratio=0.3 drops more tokens, for speed
print(model.config.id2label[logits.argmax(-1).item()])""",
    "EverestForPreTraining": """with torch.no_grad():
    output = model(pixel_values)
print(output.loss, output.logits.shape)  # predicted pixels of the tokens output.target_ids""",
    "EverestModel": """with torch.no_grad():
    features = model(pixel_values).last_hidden_state.mean(dim=1)  # (1, D)""",
}


def write_card(folder: Path, run: Run | None = None, *, steps: int = 0, figures: Figures = None) -> Path:
    """Write the card of the model in a folder as its README.md and return the path; arguments as in `make_card`."""
    path = folder / CARD
    path.write_text(make_card(folder, run, steps=steps, figures=figures), encoding="utf-8")
    return path


def make_card(
    folder: Path, run: Run | None = None, *, steps: int = 0, figures: Figures = None, name: str | None = None
) -> str:
    """Return the card of the model in a folder; without a run, the card says only what the configuration tells.

    steps: of the optimizer, so far. figures: of the last evaluation, by name; None while the run goes on. name: the
    model's; by default the run's or the folder's.

    Raises:
        ValueError: the folder holds no model of EVEREST.
    """
    config = EverestConfig.from_pretrained(folder)
    architecture = config.architectures[0] if config.architectures else None
    if architecture not in MODELS:
        raise ValueError(f"{folder}: is a checkpoint of {architecture}, not of EVEREST")
    name = name or _name_of(folder, run)
    license = _license_of(run)
    card = ModelCard(TEMPLATE.read_text(encoding="utf-8"))
    card.data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="video-classification" if architecture == CLASSIFIER else None,
        tags=TAGS,
        base_model=_hub_name(run.recipe.model) if run else None,
        datasets=_datasets(run.recipe) if run else None,
        **(_results(name, run.recipe, figures) if run and figures else {}),
    )
    parts = {
        "title": f"# {name}",
        "about": _about(architecture, config),
        "use": _use(architecture, public_path(folder)),
        "run": _run(run, steps, figures) if run else "",
        "licence": _licence(license, run),
    }
    filled = re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", lambda part: parts[part[1]], card.text, flags=re.DOTALL)
    card.text = re.sub(r"\n{3,}", "\n\n", filled)
    return str(card)


def named_for_hub(card: str, repo: str) -> str:
    """Return a card of `make_card` for the repository `repo`: its example loads `repo`, its pictures lie beside it."""
    card = card.replace("](../", "](")
    return re.sub(r'^name = "[^"]*"', lambda _: f'name = "{repo}"', card, count=1, flags=re.MULTILINE)


def public_path(path: str | os.PathLike) -> str:
    """Return a path that shows nothing private: a relative one, one from the home folder on, or its last two parts.

    >>> public_path("data/train.txt"), public_path("/data/secret/ucf101/train.txt")
    ('data/train.txt', 'ucf101/train.txt')
    """
    path = Path(path)
    if not path.is_absolute():
        return path.as_posix()
    home = Path.home()
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else Path(*path.parts[1:][-2:]).as_posix()


def public_recipe(text: str) -> str:
    """Return a recipe, YAML as `Recipe.save` writes it, with public paths and without the repository it is pushed to."""
    values = {name: value for name, value in yaml.safe_load(text).items() if name != "push_to_hub"}
    for name in PATHS:
        if values.get(name) is not None:
            values[name] = public_path(values[name])
    return yaml.safe_dump(values, sort_keys=False)


# ------------------------------------------------------------------------------------------------ parts of the card


def _name_of(folder: Path, run: Run | None) -> str:
    if run is None:
        return folder.resolve().name
    return Path(run.recipe.push_to_hub or run.recipe.output_dir).resolve().name


def _about(architecture: str, config: EverestConfig) -> str:
    height, width = config.frame_size
    lines = [
        f"{MODELS[architecture][1]}: an encoder of depth {config.num_hidden_layers} and hidden size "
        f"{config.hidden_size} on clips of {config.num_input_frames} frames of {height} × {width} pixels."
    ]
    if architecture == CLASSIFIER:
        average = ", on the average of clips," if config.token_budget == "batch" else ""
        lines.append(
            f"It keeps {config.num_kept_tokens()} of a clip's {config.num_tokens} tokens{average} (`keep_ratio` "
            f"{config.keep_ratio:g}, `token_selection` {config.token_selection}) and knows {config.num_labels} "
            f"label{'s' if config.num_labels > 1 else ''}."
        )
    else:
        lines.append(
            f"In pre-training its encoder sees {config.num_visible_tokens} of a clip's {config.num_tokens} tokens and "
            f"predicts {config.num_target_tokens} (`mask_ratio` {config.mask_ratio:g}, `pretraining_keep_ratio` "
            f"{config.pretraining_keep_ratio:g}, `token_selection` {config.token_selection})."
        )
    lines.append(_cost(config, "inference" if architecture == CLASSIFIER else "pretrain"))
    return " ".join(lines)


def _cost(config: EverestConfig, task: Use) -> str:
    average = " that keeps the average" if config.token_budget == "batch" else ""
    flops = {f"A forward pass of a clip{average} takes": clip_cost(config, task)}
    if task == "inference":
        flops["with all tokens kept it would take"] = clip_cost(config, task, keep_ratio=1)
    shares = [f"{what} {cost.forward / 1e9:.3g} GFLOPs" for what, cost in flops.items()]
    return f"{'; '.join(shares)} (a multiplication with its addition counts as two)."


def _use(architecture: str, name: str) -> str:
    auto_class = MODELS[architecture][0]
    return f"""```python
import torch
from transformers import {auto_class}, AutoVideoProcessor

name = "{name}"  # a folder, or a repository on the Hub
model = {auto_class}.from_pretrained(name, trust_remote_code=True).eval()
processor = AutoVideoProcessor.from_pretrained(name, trust_remote_code=True)
pixel_values = processor("clip.mp4", return_tensors="pt")["pixel_values"]  # (1, T, C, H, W)
{USES[architecture]}
```"""


def _run(run: Run, steps: int, figures: Figures) -> str:
    recipe = run.recipe
    rows = {
        "task": TASK_NAMES[recipe.task],
        "started from": f"`{_source(recipe.model)}`" if recipe.model else "random weights",
        "training videos": f"{run.num_videos:,} of `{_source(recipe.train)}`",
        "held-out videos": f"{run.num_val:,} of `{_source(recipe.val)}`" if recipe.val else "none",
        "steps": f"{steps:,} of {run.total_batch} clips",
        "hardware": run.hardware,
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    return "\n".join(
        [
            "## Training",
            "",
            *_table(rows),
            "",
            "The values of the recipe that differ from the defaults of its task:",
            "",
            f"```yaml\n{yaml.safe_dump(_settings(recipe), sort_keys=False, default_flow_style=None).strip()}\n```",
            "",
            "## Evaluation",
            "",
            *_evaluation(run.recipe, figures),
            *_pictures(figures),
        ]
    )


def _evaluation(recipe: Recipe, figures: Figures) -> list[str]:
    if figures is None:
        return ["This is a checkpoint of a run that goes on: it has not been evaluated as its result will be."]
    if not figures:
        return ["No videos were held out, so nothing was measured."]
    rows = {_figure(name)[1]: value for name, value in with_spread(figures, 4).items()}
    return [f"On the held-out videos, {_protocol(recipe)}:", "", *_table(rows)]


def _pictures(figures: Figures) -> list[str]:
    """Show the pictures that a run draws at its end. They lie in the run's folder, the card in the model's below it."""
    if figures is None:
        return []
    return ["", "![Loss and figures over the steps](../curves.png)", "", "![Tokens that it keeps](../tokens.png)"]


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _protocol(recipe: Recipe) -> str:
    """Say which views of each video the last evaluation used, as train_accelerate.py chooses them."""
    if recipe.task == "pretrain":
        return "the centre clip of each"
    return f"{recipe.segments} × {recipe.crops} views of each (segments × crops), scores averaged"


def _figure(name: str) -> tuple[str, str]:
    """Return the Hub's identifier of a figure, and its name for people."""
    short = name.removeprefix("val_")
    if few := re.fullmatch(r"(linear|knn)_(\d+)", short):
        return "accuracy", f"top-1 of {FEW_SHOT[few[1]]}, {few[2]} label{'s' * (few[2] != '1')} a class, {DRAWS} draws"
    return FIGURES.get(short, (short, short))


def _results(name: str, recipe: Recipe, figures: dict[str, float]) -> dict:
    """Return the arguments of ModelCardData that put the figures into the card's model-index."""
    results = []
    for figure, value in figures.items():
        if figure.endswith(SPREAD):
            continue
        kind, title = _figure(figure)
        results.append(
            EvalResult(
                task_type="video-classification" if recipe.has_labels else "self-supervised-learning",
                dataset_type=_hub_name(recipe.val) or "videofolder",
                dataset_name=_source(recipe.val),
                metric_type=kind,
                metric_name=f"{title}, {_protocol(recipe)}",
                metric_value=value,
            )
        )
    return {"model_name": name, "eval_results": results}


def _settings(recipe: Recipe) -> dict:
    """Return the values of a recipe that differ from its task's defaults and that tell others something."""
    return {name: value for name, value in recipe.settings().items() if name not in NOT_SETTINGS}


def _license_of(run: Run | None) -> str | None:
    """Return the licence of the weights if it is known: the code's for new weights, else that of the model they start from."""
    if run is None:
        return None
    if run.recipe.model is None:
        return "apache-2.0"
    card = Path(run.recipe.model) / CARD
    source = card if card.is_file() else _hub_name(run.recipe.model)
    if source is None:  # a folder without a card; on the Hub, its name could be that of another model
        return None
    try:
        return ModelCard.load(source).data.get("license")
    except Exception:  # no card, no such repository, no network: not known
        return None


def _licence(license: str | None, run: Run | None) -> str:
    if license is not None:
        return f"Weights: {license}. Code: Apache 2.0."
    if run is None:
        return "Code: Apache 2.0. The licence of the weights has not been named."
    return f"Code: Apache 2.0. The weights come from `{_source(run.recipe.model)}`, whose licence holds for them too."


def _datasets(recipe: Recipe) -> list[str] | None:
    return sorted({name for name in map(_hub_name, (recipe.train, recipe.val)) if name}) or None


def _source(source) -> str:
    """Return what may be published of a path or of a name on the Hub."""
    return _hub_name(source) or public_path(source)


def _hub_name(source: str | None) -> str | None:
    """Return a name on the Hub without its configuration, None for a path."""
    if source is None or Path(source).exists() or Path(source).parent.is_dir():
        return None
    name = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(:[\w.-]+)?", source)
    return name and name[1]

"""A run as its card and its uploads take it, without the work of setting one up."""

from pathlib import Path

from helpers.tiny import tiny_config

from everest_hf import EverestVideoProcessor
from everest_hf.training.recipe import Recipe
from everest_hf.training.run import Run


def run_of(recipe: Recipe, **values) -> Run:
    """Return the run of a recipe with the tests' tiny model; values: other fields of `Run`."""
    config = tiny_config()
    processor = EverestVideoProcessor.from_config(config)
    return Run(recipe, Path(recipe.output_dir), config, processor, **{"train": None, "val": None, **values})

"""Reading recipes from YAML files."""

import re
from pathlib import Path

import yaml

from ..files import packaged


class YamlLoader(yaml.SafeLoader):
    """The safe loader, which also reads 1e-3 as a number; YAML 1.1 wants 1.0e-3 and makes the other a string."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict:
    """Return what a recipe's file holds; the name of a recipe of the package is found there.

    Raises:
        ValueError: there is no such file, or it is no YAML or no mapping.
    """
    file = Path(path) if Path(path).exists() else packaged(path)
    file = file if file.is_file() else Path(path)
    try:
        values = yaml.load(file.read_text(), YamlLoader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a readable YAML recipe: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a list of 'name: value' lines")
    return values

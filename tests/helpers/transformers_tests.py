"""The suites that Transformers has for all models, from the source of the version that is installed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

FOLDER = Path(__file__).parents[2] / "build" / "transformers-tests" / transformers.__version__
PACKAGE = "transformers_tests"


class _Absent:
    """In the place of a part of the suites for other models."""


# What every configuration takes.
COMMON: dict = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "architectures": ["EverestModel"],
    "id2label": {0: "waving", 1: "clapping"},
    "label2id": {"waving": 0, "clapping": 1},
    "problem_type": "regression",
}
# What the suites import and the source that is published lacks: parts for other models, and fields of a configuration.
ABSENT = {
    "exporters": {},
    "exporters.test_export": {"ExportTesterMixin": _Absent},
    "generation": {},
    "generation.test_utils": {"GenerationTesterMixin": type("Generation", (), {})},
    "utils": {},
    "utils.test_configuration_utils": {
        "config_common_kwargs": COMMON,
    },
}


def suite(name: str) -> ModuleType:
    """Import tests/<name>.py of Transformers; the module that asks is skipped where .ci/transformers-tests has not run."""
    if not (FOLDER / "tests" / f"{name}.py").is_file():
        reason = (
            f"the tests of Transformers {transformers.__version__} are not here; .ci/transformers-tests fetches them"
        )
        pytest.skip(reason, allow_module_level=True)
    if PACKAGE not in sys.modules:
        sys.path.append(str(FOLDER / "packages"))
        _add(PACKAGE, {"__path__": [str(FOLDER / "tests")]})
        for absent, content in ABSENT.items():
            if not (FOLDER / "tests" / f"{absent.replace('.', '/')}.py").is_file():
                _add(f"{PACKAGE}.{absent}", {"__path__": [], **content})
    return importlib.import_module(f"{PACKAGE}.{name}")


def _add(name: str, content: dict) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def failing(reasons: dict[str, str]):
    """Return a decorator of a test class: the named tests fail, for the given reasons; one that passes is an error."""

    def mark(cls: type) -> type:
        for name, reason in reasons.items():
            inherited = getattr(cls, name)

            def test(self, *args, _inherited=inherited, **kwargs):
                return _inherited(self, *args, **kwargs)

            setattr(cls, name, pytest.mark.xfail(reason=reason, strict=True)(test))
        return cls

    return mark

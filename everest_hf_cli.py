"""The program everest-hf, which reads its command line before it imports the package.

`import everest_hf` registers the models with Transformers, and so imports that and PyTorch, which takes seconds. The
files that describe the command line, cli.py and commands/, import neither: they are loaded here from a package whose
`__init__.py` runs only when a command is about to.
"""

import sys
from functools import partial
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Run the command line of this process and return the exit code, as `everest_hf.cli.main` does."""
    spec = find_spec("everest_hf")
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["everest_hf"] = module_from_spec(spec)
    from everest_hf import cli

    return cli.main(load=partial(spec.loader.exec_module, package))


if __name__ == "__main__":
    sys.exit(main())

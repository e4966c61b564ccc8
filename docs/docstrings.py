"""Shows the docstrings of the package as they are meant: a line `name: text` about an argument is an item of a list."""

import re

import griffe

# name: text, or name, other_name: text
ITEM = re.compile(r"(\s*)(\w+(?:, \w+)*): (.*)")


class Docstrings(griffe.Extension):
    """Turns lines about arguments and fields into Markdown lists, before the docstrings are parsed."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs) -> None:
        self._rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **kwargs) -> None:
        made = cls.members.get("__init__")
        parameters = {parameter.name for parameter in made.parameters} if isinstance(made, griffe.Function) else set()
        self._rewrite(cls, parameters | set(cls.members))

    def _rewrite(self, documented: griffe.Object, names: set[str]) -> None:
        if documented.docstring:
            documented.docstring.value = as_lists(documented.docstring.value, names)


def as_lists(text: str, names: set[str]) -> str:
    """Return a docstring whose lines about `names` are items of Markdown lists, with what heads such lines in bold."""
    lines: list[str] = []
    before = text.splitlines()
    for i, line in enumerate(before):
        item, after = ITEM.fullmatch(line), before[i + 1] if i + 1 < len(before) else ""
        if item and names.issuperset(item[2].split(", ")):
            shown = ", ".join(f"`{name}`" for name in item[2].split(", "))
            line = f"- {shown}: {item[3]}"
            if lines and lines[-1] and not lines[-1].startswith(("- ", " ")):
                lines.append("")
        elif line and not line.startswith(" ") and not line.endswith(":") and after.startswith("    ") and not item:
            line = f"\n**{line}**\n"
        lines.append(line)
    return "\n".join(lines)

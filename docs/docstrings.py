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
    """Return a docstring whose lines about `names` are items of Markdown lists, with what heads such lines in bold.

    Sections that the parser knows, such as "Raises:", stay as they are; examples become blocks of code.
    """
    lines: list[str] = []
    has_heading = False
    place = ""  # "section" or "item", in which indented lines stay as they are, or "below" a heading
    paragraphs = text.splitlines()
    for line, after in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
        item, is_indented = ITEM.fullmatch(line), line.startswith("    ")
        if item and place != "section" and names.issuperset(item[2].split(", ")):
            shown = ", ".join(f"`{name}`" for name in item[2].split(", "))
            lines += ([] if place == "item" else [""]) + [f"- {shown}: {item[3]}"]
            place, has_heading = "item", is_indented
        elif is_indented:
            lines.append(line if place in ("item", "section") else line.strip())
        elif after.startswith("    ") and line.endswith(":"):
            lines.append(line)
            place = "section"
        elif after.startswith("    ") and line and (place != "item" or has_heading):
            lines += ["", f"**{line}**", ""]
            place = "below"
        else:
            lines.append(line)
            place = place if line else ""
    return re.sub(r"((?:^>>> .*\n(?:(?!>>>).+\n?)*)+)", r"```python\n\1\n```\n", "\n".join(lines), flags=re.MULTILINE)

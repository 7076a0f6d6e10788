"""The fields of the dataclasses of settings, with the comments beside them as their description."""

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Setting:
    name: str
    kind: Any  # its type
    default: Any  # dataclasses.MISSING where it has none
    comment: str  # behind it, else above it, else what its name says; "" for none


def settings_of(group: type, values: Any = None) -> list[Setting]:
    """All fields of a dataclass, inherited ones first, with the defaults of an instance where one is given."""
    comments: dict[str, str] = {}
    for base in reversed(group.__mro__[:-1]):
        comments |= comments_of(base)
    hints = get_type_hints(group)
    found = []
    for item in fields(group):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if values is not None and values is not MISSING:
            default = getattr(values, item.name)
        found.append(Setting(item.name, hints[item.name], default, comments.get(item.name) or usual(item.name)))
    return found


def usual(name: str) -> str:
    """What a name means in every group that has it."""
    if name == "name":
        return "of the method"
    if name == "probability":
        return "of doing it, drawn for each view"
    return f"of the term `{name.removesuffix('_weight')}`" if name.endswith("_weight") else ""


def comments_of(group: type) -> dict[str, str]:
    """Field -> the comment behind its last line, else the lines of comment right above it."""
    source = textwrap.dedent(inspect.getsource(group))
    comments = {
        token.start[0]: (token.string.lstrip("# ").strip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        own = [comments[line][0] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments]
        line = node.lineno - 1
        while not own and comments.get(line, ("", False))[1]:
            line -= 1
        above = [comments[each][0] for each in range(line + 1, node.lineno)] if not own else []
        if own or above:
            found[ast.unparse(node.target)] = " ".join(own or above)
    return found


def description(group: type) -> str:
    """The docstring, "" where a dataclass has none but its own signature."""
    text = inspect.getdoc(group) or ""
    return "" if text.startswith(f"{group.__name__}(") else text

"""Lets the reference of Python read our docstrings, in which `Returns: text` on one line is a section."""

import re
from typing import Any

import griffe

RETURNS = re.compile(r"^(Returns|Yields): (?=\S)", re.MULTILINE)
RAISES = re.compile(r"^Raises: (\w+)[,:]? (?=\S)", re.MULTILINE)


class OneLineSections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            # The type is written out: griffe would take what stands before the text's first colon for it.
            returned = f"{obj.returns}: " if isinstance(obj, griffe.Function) and obj.returns else ""
            text = RETURNS.sub(lambda section: f"{section[1]}:\n    {returned}", obj.docstring.value)
            obj.docstring.value = RAISES.sub(r"Raises:\n    \1: ", text)

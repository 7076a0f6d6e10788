"""Lets the reference of Python read our docstrings, in which `Returns: text` on one line is a section."""

import re
from typing import Any

import griffe

RETURNS = re.compile(r"^(Returns|Yields): (?=\S)", re.MULTILINE)
RAISES = re.compile(r"^Raises: (\w+)[,:]? (?=\S)", re.MULTILINE)


class OneLineSections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = RETURNS.sub(r"\1:\n    ", obj.docstring.value)
            obj.docstring.value = RAISES.sub(r"Raises:\n    \1: ", text)

"""What happens in one training step? docs/step.md, whose tables the step itself writes.

    python -m studies.step            # writes the tables of docs/step.md anew

The prose of the page is written by hand. Each row of its tables names a function and its file.
This program runs COMMAND, notes what goes into each function and what comes out at its first
call, and fills in the rows. To follow another function, add a row with its name and file.
"""

import contextlib
import importlib
import inspect
import io
import operator
import re
import sys
import tempfile
from pathlib import Path

from torch import Tensor

import d2det
from baselines.faster_rcnn import Rois

PAGE = Path(__file__).resolve().parent.parent / "docs" / "step.md"
COMMAND = "--train --preset tiny --steps 1 --batch 1 --num-train 1 --num-val 1 --eval-times 1"
ROW = re.compile(r"^\| `(.+?)` \| \[.*?\]\(\.\./(.+?)\.py.*$", re.M)


def described(value) -> str:
    """Its shape, or those of what it holds; nothing for what has no shape.

    >>> described({"boxes": Tensor(2, 4), "note": None, "levels": [Tensor(3)] * 5})
    '{boxes [2, 4], note, levels [3] to [3]}'
    """
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Rois):
        return f"{len(value)} RoIs"
    if isinstance(value, dict):
        few = named(dict(list(value.items())[:5]))
        return f"{{{few}, ..}}" if len(value) > 5 else f"{{{few}}}"
    if not isinstance(value, (list, tuple)) or not value:
        return ""
    shapes = [described(v) for v in value]
    if len(value) > 3 and all(isinstance(v, Tensor) for v in value):
        return f"{shapes[0]} to {shapes[-1]}"  # the levels of a pyramid
    if len(value) > 3 and isinstance(value[0], dict):
        return f"{len(value)} x {shapes[0]}"
    return ", ".join(filter(None, shapes))


def named(values: dict) -> str:
    return ", ".join(f"{name} {described(value)}".strip() for name, value in values.items())


def follow(codes: set) -> dict:
    """Run COMMAND -> [what went in, what came out] at the first call of each code object."""
    seen: dict = {}

    def note(frame, event, result):
        code = frame.f_code
        if code in codes and event == "call":
            arguments = {k: v for k, v in frame.f_locals.items() if k != "self"}
            seen.setdefault(code, [named(arguments), ""])
        elif code in codes and event == "return" and not seen[code][1]:
            seen[code][1] = described(result)

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        sys.setprofile(note)
        try:
            d2det.main([*COMMAND.split(), "--out", out, "--device", "cpu", "--workers", "0"])
        finally:
            sys.setprofile(None)
    return seen


def filled(text: str) -> str:
    """The page with its rows as the step is now."""

    def code_of(row: re.Match):
        module = importlib.import_module(row[2].replace("/", "."))
        return inspect.unwrap(operator.attrgetter(row[1])(module)).__code__

    seen = follow({code_of(row) for row in ROW.finditer(text)})

    def rewritten(row: re.Match) -> str:
        code = code_of(row)
        went_in, came_out = seen[code]
        where = f"[{row[2]}.py:{code.co_firstlineno}](../{row[2]}.py#L{code.co_firstlineno})"
        return f"| `{row[1]}` | {where} | {went_in} | {came_out} |"

    return ROW.sub(rewritten, text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))

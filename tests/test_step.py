"""docs/step.md says what a step does now, and its links lead to the functions."""

import doctest
import re

from studies import step


def without_lines(page: str) -> str:
    """Line numbers change with every edit of a file; all else is compared."""
    return re.sub(r"(\.py(:|#L))\d+", r"\1", page)


def test_page_is_what_the_step_does():
    page = step.PAGE.read_text()
    assert without_lines(step.filled(page)) == without_lines(page), "run python -m studies.step"
    assert len(step.ROW.findall(page)) > 20
    assert doctest.testmod(step) == (0, 1)

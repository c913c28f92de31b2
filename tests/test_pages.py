"""The annotated pages: nothing of a file is lost, and formulas become formulas."""

import ast
import doctest
import html
import re

import pytest

pytest.importorskip("pygments")  # pytest brings it from 8.4 on
from studies import formulas, pages
from studies.formulas import formula


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    pages.main(str(out))
    return {name: (out / f"{name}.html").read_text() for name in ("index", *pages.METHODS)}


@pytest.mark.parametrize("method", pages.METHODS)
def test_all_code_and_all_words_are_on_the_page(written, method):
    source = (pages.ROOT / f"{method}.py").read_text()
    text = text_of(written[method])
    code = source.split("\n")
    nodes = [ast.parse(source), *ast.walk(ast.parse(source))]
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            d = node.body[0]
            words = re.findall(r"[A-Za-z]{3,}", ast.get_docstring(node))
            lost = [w for w in words if w not in text and w not in formulas.SYMBOLS and w != "sqrt"]
            assert not lost
            code[d.lineno - 1 : d.end_lineno] = [""] * (d.end_lineno - d.lineno + 1)
    at = 0
    for line in filter(None, map(str.strip, code)):
        if line.startswith("#"):
            assert line.strip("#- ").replace("`", "") in text
            continue
        at = text.find(line, at)  # in the file's order
        assert at >= 0, line


def test_links_and_headings(written):
    page = written["d2det"]
    for link in re.findall(r'href="#(.+?)"', page):
        assert f'id="{link}"' in page
    assert 'href="https://github.com/JialeCao001/D2Det"' in page
    assert "<h2>equations</h2>" in page and '<h3 id="DenseLocalHead.cells">' in page
    assert 'href="cpm_rcnn.html"' in written["index"]
    assert page.count("<math ") > 12


def test_formulas():
    assert doctest.testmod(formulas).attempted == 1
    assert doctest.testmod(formulas).failed == 0
    loose = formula("a b / (c + d) + 1")
    assert "><mfrac><mrow><mi>a</mi>" in loose and loose.endswith("<mn>1</mn></math>")
    assert "<mfrac><mn>1</mn><mrow><msup><mi>S</mi>" in formula("1/S^2 sum_j g_j")
    assert "<msub><msup><mi>λ</mi><mo>′</mo></msup><mi>i</mi></msub>" in formula("lambda'_i = 1")
    assert "<msup><mi>w</mi><mo>*</mo></msup>" in formula("|w - w*| / w*")
    assert "<mo>·</mo>" in formula("alpha * p")
    assert "<mi>IoU</mi><mo>&lt;</mo><mn>0.4</mn></math>" in formula("IoU < 0.4")
    assert "</msqrt>" in formula("sqrt(w* h*)") and formula("(a") and formula("a)")

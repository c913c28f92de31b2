"""How does a method's file read as a page, its prose and formulas beside the code?

    pip install pygments
    python -m studies.pages OUT         # OUT/index.html, and OUT/METHOD.html for each method

The Python files are the only source. Docstrings, and comments above code, become prose; an
indented block of a docstring becomes formulas; code and examples stay as they are. This needs
no torch, and the pages need no JavaScript.
"""

import ast
import html
import re
import sys
from pathlib import Path
from textwrap import dedent

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonConsoleLexer, PythonLexer

from studies.formulas import formula

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("iou_aware_retinanet", "dc_loss_clnms", "double_head", "cpm_rcnn", "d2det")
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
COLOURS = HtmlFormatter(nowrap=True, style="friendly")
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{}</title>
<style>{}</style><meta name="viewport" content="width=device-width, initial-scale=1">
<nav>{}</nav>"""


# ------------------------------------------------------------------------------ prose


def inline(text: str, names: re.Pattern) -> str:
    """A line of prose: `code`, web links, and links to the definitions of this page."""
    text = html.escape(text, quote=False)
    text = re.sub(r"(https?://\S*[^\s.,])", r'<a href="\1">\1</a>', text)
    text = re.sub(r" (Papers?:|Releases?:)", r"<br>\1", text)

    def linked(code: re.Match) -> str:
        return "<code>" + names.sub(r'<a href="#\1">\1</a>', code[1]) + "</code>"

    return re.sub("`(.+?)`", linked, text)


def table(lines: list[str], names: re.Pattern) -> str:
    """Columns, two blanks or more apart; whatever looks like a formula is set as one."""
    joined = re.sub(r"\n {24} *", " ", "\n".join(lines))  # the last column of a row goes on
    rows = [re.split(r"\s{2,}", line.strip()) for line in joined.split("\n")]

    def cell(text: str) -> str:
        if re.search(r"[=^|<>]| [-+/] ", text) and '"' not in text:
            return formula(text.replace("`", ""))
        return inline(names.sub(r"`\1`", text), names)

    made = ["".join(f"<td>{cell(text)}</td>" for text in row) for row in rows]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in made)}</table>"


def prose(text: str, names: re.Pattern) -> str:
    """A docstring: its paragraphs, formulas and sketches."""
    # a paragraph begins behind a colon that ends a line, and where indentation ends
    text = re.sub(r":\n +", ":\n\n", text)
    text = re.sub(r"(\n +.*)\n(?=\S)", r"\1\n\n", text)
    made = []
    for block in re.split(r"\n\s*\n", text):
        if block[:1] == " " and re.search(r"->|\|--", block):
            made.append(f"<pre>{html.escape(dedent(block))}</pre>")
        elif block[:1] == " ":
            made.append(table(block.split("\n"), names))
        else:
            made.append(f"<p>{inline(' '.join(block.split()), names)}</p>")
    return "".join(made)


# ------------------------------------------------------------------------------ pages


def first_line(node, lines: list[str]) -> int:
    """Where a statement begins, with decorators and comments above it; counted from 0."""
    line = min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))) - 1
    while re.match(r"\s*(#|$)", lines[line - 1]):
        line -= 1
    return line


def row(name: str, docstring: str, lines: list[str], names: re.Pattern) -> str:
    """A piece of code beside its prose; above both the heading, if a section begins here."""
    heading, comment = "", []
    while re.match(r"#|$", lines[0].strip()):
        line = lines.pop(0).strip("# ")
        if line.startswith("-----"):
            heading = f"<h2>{line.strip('- ')}</h2>"
        elif line:
            comment.append(inline(line, names))
    # a paragraph ends with a full stop; other comments are lists, a line an entry
    joined = (" " if comment and comment[-1][-1] == "." else "<br>").join(comment)
    text = f"<p>{joined}</p>" + (f'<h3 id="{name}">{name}</h3>' if name else "")
    docstring, _, example = docstring.partition("\n\n>>>")
    left = f"<div>{text}{prose(docstring, names)}</div>"
    right = highlight(dedent("\n".join(lines)).rstrip(), PythonLexer(), COLOURS)
    if example:
        right += "\n" + highlight(f">>>{example}", PythonConsoleLexer(), COLOURS)
    return f'{heading}<section>{left}<pre class="code">{right}</pre></section>'


def page(source: str) -> str:
    """A file in its order: its docstring, then a row for each function, class and method."""
    module, lines = ast.parse(source), source.split("\n")
    named: list[tuple[str, ast.AST]] = [("", module.body[1])]  # imports come first
    for node in module.body:
        if isinstance(node, DEFINITIONS):
            named.append((node.name, node))
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(member, ast.FunctionDef):
                named.append((f"{node.name}.{member.name}", member))
    longest = sorted((re.escape(name) for name, _ in named[1:]), key=len, reverse=True)
    names = re.compile(rf"\b({'|'.join(longest)})\b")
    title, _, about = ast.get_docstring(module).partition("\n")
    made = f"<header><h1>{title}</h1>{prose(about.strip(), names)}</header>"
    starts = [first_line(node, lines) for _, node in named]
    for (name, node), begin, end in zip(named, starts, [*starts[1:], len(lines)]):
        part, docstring = lines[begin:end], ast.get_docstring(node) if name else None
        if docstring:
            del part[node.body[0].lineno - 1 - begin : node.body[0].end_lineno - begin]
        made += row(name, docstring or "", part, names)
    return made


def main(out: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    style = COLOURS.get_style_defs(".code") + (ROOT / "docs/pages.css").read_text()
    links = [f'<a href="{method}.html">{method}.py</a>' for method in METHODS]
    entries = ""
    for method, link in zip(METHODS, links):
        source = (ROOT / f"{method}.py").read_text()
        head = HEAD.format(method, style, " ".join(links))
        (folder / f"{method}.html").write_text(head + page(source))
        entries += f"<p>{link}<br>{ast.get_docstring(ast.parse(source)).splitlines()[0]}</p>"
    head = HEAD.format("Two-Task Detection", style, "")
    index = f"<header><h1>Two-Task Detection, annotated</h1>{entries}</header>"
    (folder / "index.html").write_text(head + index)


if __name__ == "__main__":
    main(*sys.argv[1:])

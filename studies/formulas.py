"""How does a formula of a docstring look in a browser? Plain text -> MathML, for `pages`.

L_IoU, c0, lambda', w*, F~     subscripts, primes, stars and tildes
a / b c                        a fraction of all that is multiplied; in a/b c only a and b
x^alpha, sqrt(x), sum_i        powers, roots, sums
"""

import html
import re

GREEK = "alpha beta gamma delta eps theta lambda phi omega sum".split()
SYMBOLS = dict(zip(GREEK, "αβγδεθλφω∑"))
SYMBOLS |= {"-": "−", "*": "·", ".": "·", "..": "…", ">=": "≥", "<=": "≤", "'": "′"}
SIGNS = r"[<>]=|[-+=<>,;:]|\.\."  # they stand between terms
NAME = r"(\d[\d.]*\b|[A-Za-z]+(?:'s)?)(\d?)((?:['~*](?![A-Za-z0-9(]))?)(?:_(\w+))?"
TOKEN = re.compile(rf" / |\s+|{NAME}|{SIGNS}|.")
CLOSING = {"(": ")", "[": "]", "|": "|"}


def formula(text: str) -> str:
    """
    >>> formula("1 / (e + eps)").removeprefix("<math displaystyle='true'>")
    '<mfrac><mrow><mn>1</mn></mrow><mrow><mi>e</mi><mo>+</mo><mi>ε</mi></mrow></mfrac></math>'
    """
    text = re.sub(rf"\s*({SIGNS})\s*", r"\1", text)
    tokens = [match[0] for match in TOKEN.finditer(text)]
    return f"<math displaystyle='true'>{expression(tokens)}</math>"


def expression(tokens: list[str], end: str = "") -> str:
    """Terms and the signs between them, up to the closing bracket `end`."""
    done, term = "", []
    while tokens and tokens[0] != end:
        if re.fullmatch(SIGNS, tokens[0]):
            done += product(term) + sign(tokens.pop(0))
            term = []
        else:
            term.append(factor(tokens))
    del tokens[:1]
    return done + product(term)


def product(factors: list[str]) -> str:
    """Factors side by side, or a fraction of those before and those behind the loose slash."""
    if " / " not in factors:
        return "".join(factors)
    at = factors.index(" / ")
    parts = (f"<mrow>{bare(part)}</mrow>" for part in (factors[:at], factors[at + 1 :]))
    return f"<mfrac>{''.join(parts)}</mfrac>"


def bare(factors: list[str]) -> str:
    """Factors side by side; a bracket that stands alone loses its two signs."""
    alone = re.fullmatch(r"<mrow><mo>\(</mo>(.*)<mo>\)</mo></mrow>", factors[0])
    return alone[1] if alone and len(factors) == 1 else product(factors)


def factor(tokens: list[str]) -> str:
    """A number, a name or a bracket, with its power, or as a small fraction."""
    token = tokens.pop(0)
    if token in CLOSING:
        close = CLOSING[token]
        made = f"<mrow>{sign(token)}{expression(tokens, close)}{sign(close)}</mrow>"
    elif token == "sqrt":
        made = f"<msqrt>{bare([factor(tokens)])}</msqrt>"
    else:
        made = atom(token)
    while tokens and tokens[0] in "^/":
        tag = {"^": "msup", "/": "mfrac"}[tokens.pop(0)]
        made = f"<{tag}>{made}<mrow>{bare([factor(tokens)])}</mrow></{tag}>"
    return made


def sign(token: str) -> str:
    return f"<mo>{html.escape(SYMBOLS.get(token, token))}</mo>"


def atom(token: str) -> str:
    """A number, or a name with what is attached to it; a blank; any other sign."""
    if token == " / ":
        return token
    if token.isspace():
        return '<mspace width="0.25em"></mspace>'
    parts = re.fullmatch(NAME, token)
    if not parts:
        return sign(token)
    name, digit, mark, below = parts.groups()
    tag = "mn" if name[0].isdigit() else "mo" if name == "sum" else "mi"
    made = f"<{tag}>{SYMBOLS.get(name, name)}</{tag}>"
    if mark:
        over = "mover" if mark == "~" else "msup"
        mark = "*" if mark == "*" else SYMBOLS.get(mark, mark)
        made = f"<{over}>{made}<mo>{mark}</mo></{over}>"
    return f"<msub>{made}<mi>{digit or below}</mi></msub>" if digit or below else made

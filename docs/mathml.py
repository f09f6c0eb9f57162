"""Formulas become MathML when the site is built, so that reading it loads nothing from elsewhere.

pymdownx.arithmatex finds them, in pages and in docstrings. What math-core cannot read ends the
build: `mkdocs build` names the page and the place in the formula.
"""

import re
from html import unescape
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

FORMULA = re.compile(
    r'<span class="arithmatex">\\\((?P<inline>.*?)\\\)</span>'
    r'|<div class="arithmatex">\\\[(?P<block>.*?)\\\]</div>',
    re.DOTALL,
)
ANSI = re.compile(r"\x1b\[[\d;]*m")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page's body."""
    converter = LatexToMathML()

    def mathml(found: re.Match[str]) -> str:
        block = found["inline"] is None
        formula = unescape(found["block"] if block else found["inline"])
        try:
            return converter.convert_with_local_state(formula, displaystyle=block)
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: {ANSI.sub('', str(error))}") from None

    shown = FORMULA.sub(mathml, html)
    if 'class="arithmatex"' in shown:  # in a form of another version of the extension
        raise PluginError(f"{page.file.src_uri} holds a formula that was not converted")
    return shown

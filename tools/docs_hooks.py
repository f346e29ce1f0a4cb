"""What MkDocs does beyond its plugins: equations as MathML, and the roles of docstrings.

Browsers draw MathML themselves, so that the pages need neither a script nor the network.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>~?(.*?)</code>")


def _mathml(match: re.Match[str]) -> str:
    tag, opening, latex = match.groups()
    made = convert(html.unescape(latex).strip(), display="block" if opening == "[" else "inline")
    return f'<{tag} class="equation">{made}</{tag}>' if tag == "div" else made


def on_page_content(content: str, **_: Any) -> str:
    """Called by MkDocs with the HTML of every page."""
    content = _EQUATION.sub(_mathml, content)
    if "arithmatex" in content:
        raise ValueError("an equation was not converted")
    return _ROLE.sub(r"<code>\1</code>", content)

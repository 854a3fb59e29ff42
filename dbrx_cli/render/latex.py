"""Formulas in Markdown: LaTeX between its marks is text, every character of it. Models write it in most replies."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

# \(...\) and \[...\], $$...$$, and $...$ as pandoc has it: no space inside the marks, no digit behind them ("$5 and
# $10" is money). A mark without its other half keeps its backslash, too.
INLINE = re.compile(
    r"\\\(.+?\\\)|\\\[.+?\\\]|\\[()\[\]]|\$\$.+?\$\$|\$(?![\s$])(?:\\.|[^$\\\n])*(?<!\s)\$(?!\d)", re.DOTALL
)
BLOCKS = {"$$": "$$", "\\[": "\\]"}


def latex(rules: MarkdownIt) -> None:
    """A plugin of markdown-it."""
    rules.inline.ruler.before("escape", "latex", _inline)
    rules.block.ruler.before("table", "latex", _block, {"alt": ["paragraph", "blockquote", "list"]})


def _inline(state: StateInline, silent: bool) -> bool:
    found = INLINE.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.push("text", "", 0).content = found.group()
    state.pos = found.end()
    return True


def _block(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    """Lines from one that begins with a mark to one that ends with the other, or to a blank one; a paragraph."""

    def line(number: int) -> str:
        return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]].rstrip()

    closing = BLOCKS.get(line(first)[:2])
    if closing is None or state.is_code_block(first):
        return False
    if silent:
        return True
    last = first
    while not (line(last).endswith(closing) and (last > first or len(line(last)) > 2)):
        if last + 1 >= end or not line(last + 1):
            break
        last += 1
    state.line = last + 1
    state.push("paragraph_open", "p", 1).map = [first, state.line]
    token = state.push("inline", "", 0)
    token.content = state.getLines(first, state.line, state.blkIndent, False).strip()
    token.map, token.children = [first, state.line], []
    state.push("paragraph_close", "p", -1)
    return True

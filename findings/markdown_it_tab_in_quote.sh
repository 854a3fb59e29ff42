#!/bin/sh
# A tab behind a quote's mark, inside a fenced block: by CommonMark (tabs are 4 columns, the mark takes one of them) two
# columns are left and become spaces, as in cmark, the reference. markdown-it-py 4.3.0 leaves the tab: code that is cut
# out of a quoted block is indented otherwise. (Outside a fence, in indented code, both count columns.)
# Seen: "cmark '  x', markdown-it-py '\tx'".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet markdown-it-py==4.3.0 cmarkgfm==2025.10.22
"$folder/venv/bin/python" - <<'END'
import re
import cmarkgfm
from markdown_it import MarkdownIt

text = "> ```\n>\tx\n> ```\n"
first = re.search(r"<code>(.*?)\n</code>", cmarkgfm.markdown_to_html(text), re.S)[1]
second = next(token.content for token in MarkdownIt("commonmark").parse(text) if token.type == "fence").rstrip("\n")
print(f"cmark {first!r}, markdown-it-py {second!r}")
raise SystemExit((first, second) != ("  x", "\tx"))
END

#!/bin/sh
# typer 0.29.2 requires pydantic and imports it whenever it runs a command or shows its help, a command without options too;
# 0.15.4 has no such dependency. A program that watches its start-up pays for pydantic's core with a command of one bool.
# Seen: "0.29.2: option True, its help True, no option True, help of all False", "0.15.4: option False, its help False, no option
# False, help of all False". Exits 1 if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/try.py" <<'PY'
import importlib.metadata, sys
import typer

app = typer.Typer()

@app.command()
def plain() -> None: ...

@app.command()
def loud(loud: bool = False) -> None: ...

try:
    app(sys.argv[1:])
finally:
    print("pydantic" in sys.modules, file=sys.stderr)
PY
for version in 0.29.2 0.15.4; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "typer==$version" "click==8.1.8"
    tried() { "$work/$version/bin/python" "$work/try.py" "$@" 2>&1 >/dev/null | tail -n 1; }
    echo "$version: option $(tried loud --loud), its help $(tried loud --help), no option $(tried plain), help of all $(tried --help)" \
        | tee -a "$work/told"
done
grep -qx "0.29.2: option True, its help True, no option True, help of all False" "$work/told"
grep -qx "0.15.4: option False, its help False, no option False, help of all False" "$work/told"

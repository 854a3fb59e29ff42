#!/bin/sh
# Triton 3.6.0's interpreter (TRITON_INTERPRET=1) turns a loaded number that bounds a loop into a Python int by int() of a
# NumPy array of one element and one axis. NumPy 2.3 warns of that, NumPy 2.4 raises TypeError, so a kernel that
# compiles for a card cannot be interpreted.
# Seen: "3.6.0 with numpy 2.3.5: 10.0", "3.6.0 with numpy 2.4.6: InterpreterError (TypeError)", "3.9.0 with numpy 2.4.6: 10.0".
# Exits 1 if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/try.py" <<'PY'
import os, warnings
os.environ["TRITON_INTERPRET"] = "1"
warnings.simplefilter("ignore")
import numpy, torch, triton
import triton.language as tl

@triton.jit
def summed(bound, out):
    total = 0.0
    for step in range(tl.load(bound)):
        total += step
    tl.store(out, total)

out = torch.zeros(1)
try:
    summed[(1,)](torch.tensor([5], dtype=torch.int32), out)
    told = out.item()
except Exception as error:
    told = f"{type(error).__name__} ({type(error.__cause__ or error.__context__).__name__})"
print(f"{triton.__version__} with numpy {numpy.__version__}: {told}")
PY
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0"
for pair in 3.6.0:2.3.5 3.6.0:2.4.6 3.9.0:2.4.6; do
    "$work/venv/bin/pip" install -q "triton==${pair%:*}" "numpy==${pair#*:}"
    "$work/venv/bin/python" "$work/try.py" | tee -a "$work/told"
done
printf '3.6.0 with numpy 2.3.5: 10.0\n3.6.0 with numpy 2.4.6: InterpreterError (TypeError)\n3.9.0 with numpy 2.4.6: 10.0\n' | cmp - "$work/told"

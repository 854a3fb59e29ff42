"""Matrices packed as GPTQ and AWQ do, and the floats that AutoRound makes of them (packed_golden.safetensors).

    python -m venv rounds && rounds/bin/pip install torch==2.13.0 auto-round==0.16.1
    rounds/bin/python tests/reference/make_packed_golden.py

AutoRound writes what AutoGPTQ and AutoAWQ wrote. It dequantizes in float16.
"""

from pathlib import Path

import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear  # zero points lowered by one
from safetensors.torch import save_file
from torch import Tensor, nn

OUT = Path(__file__).parent.parent / "data" / "packed_golden.safetensors"
OUTPUTS, INPUTS, GROUP = 32, 96, 32


def linear() -> nn.Linear:
    return nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False)


def ranges(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, groups], these from 1 on: lowered by one they stay numbers of so many bits."""
    grouped = weight.unflatten(1, (-1, GROUP))
    scales = ((grouped.amax(2) - grouped.amin(2)) / (2**bits - 1)).half().float()
    return scales, (-grouped.amin(2) / scales).round().clamp(1, 2**bits - 1)


def main() -> None:
    torch.manual_seed(0)
    tensors = {}
    identity = torch.eye(INPUTS, dtype=torch.float16)
    for bits in (2, 3, 4, 8):
        source, gptq = linear(), QuantLinear(bits, GROUP, INPUTS, OUTPUTS, bias=False, g_idx=True)
        gptq.pack(source, *ranges(source.weight, bits))
        tensors |= {f"gptq.{bits}.{part}": getattr(gptq, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        tensors[f"gptq.{bits}.meant"] = gptq(identity).t()
    source = linear()
    scales, zeros = ranges(source.weight, 4)
    awq = WQLinear_GEMM.from_linear(source, 4, GROUP, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
    tensors |= {f"awq.4.{part}": getattr(awq, part) for part in ("qweight", "qzeros", "scales")}
    tensors["awq.4.meant"] = awq(identity).view(INPUTS, OUTPUTS).t()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, OUT)


if __name__ == "__main__":
    main()

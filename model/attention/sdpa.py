"""Attention by PyTorch's fused kernels."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .plan import AttentionPlan

PIECE = 256  # queries at once; `prefill` takes twice as many a step


class SdpaAttention:
    """`scaled_dot_product_attention`, with the causal mask aligned to the end."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, plan: AttentionPlan) -> Tensor:
        batch, seq, heads, head_dim = q.shape
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if seq == 1:
            # One query sees every key of its row. Its group takes the place of the sequence, so no key is repeated:
            # on a CPU in bfloat16 this is 20 times faster than enable_gqa.
            grouped = q.view(batch, k.shape[1], heads // k.shape[1], head_dim)
            mask = None if plan.uniform else plan.mask(q.device)
            return scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).view_as(q)
        # A CPU's kernel computes whole blocks of keys, masked or not: pieces leave the later ones out. Of a longer step
        # it leaves most out by itself, and the masks of pieces would take longer.
        piece = PIECE if plan.uniform and q.device.type == "cpu" and seq <= 2 * PIECE else seq
        found = []
        for start in range(0, seq, piece):
            end = min(start + piece, seq)
            keys = plan.kv_len - seq + end
            # is_causal aligns to the top left, which is right only when no key came before.
            causal = plan.uniform and end - start == keys
            out = scaled_dot_product_attention(
                q[:, start:end].transpose(1, 2),
                k[:, :, :keys],
                v[:, :, :keys],
                attn_mask=None if causal else plan.mask(q.device)[..., start:end, :keys],
                is_causal=causal,
                scale=scale,
                enable_gqa=True,
            )
            found.append(out.transpose(1, 2))
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def build() -> SdpaAttention:
    return SdpaAttention()


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None

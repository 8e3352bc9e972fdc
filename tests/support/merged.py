"""``merged_attention`` on a CPU: Triton's interpreter runs its kernels (not in bfloat16, which that gets wrong)."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from model.attention_cuda import merged_attention

__all__ = ["merged_attention"]

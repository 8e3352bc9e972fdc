"""``merged_attention`` on a CPU: its Triton kernels run in Triton's interpreter (not in bfloat16, which that gets wrong)."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from model.attention_cuda import merged_attention  # noqa: E402 - the kernels ask when they are defined

__all__ = ["merged_attention"]

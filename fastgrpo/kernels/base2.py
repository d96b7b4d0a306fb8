"""What Triton kernels take exponentials with: in base 2, the hardware's."""

from __future__ import annotations

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
PADDING = tl.constexpr(-1e30)  # finite, so that 0 * PADDING and PADDING - PADDING are 0

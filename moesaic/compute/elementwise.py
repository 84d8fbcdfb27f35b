"""The numbers of elements from which torch computes an elementwise function on several threads.

torch then cuts the tensor into one piece a thread. The last bits of exp() differ between the middle of a
piece and its end, so the bits of a row would depend on the rows beside it. Batch-invariant code passes fewer
elements at a time.
"""

from __future__ import annotations

# Of most functions, silu among them.
CUT_ELEMENTS = 32768
# Of gelu, the lowest of all.
CUT_GELU_ELEMENTS = 16384

"""The two filters of a Hyena mixer, as functions of packed rows and of the state of each sequence.

The short filter is a causal depthwise convolution over a few tokens; its state is the inputs that the next token still
needs. The long filter, h_t = Re(sum of R_s P_s^t), is a sum of complex exponentials: prompts are computed by FFT, in
pieces that pass their state on, and single tokens by one step of the recurrence. Both give the same numbers up to
rounding, wherever the tokens are cut. All computation is in float32 and complex64, whatever the dtype of the rows.

Shapes: D channels, S modes of a channel, K taps of the short filter, C channels of it (3 D), c consecutive tokens of
one sequence, n sequences with one token each, m pieces of l tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The tokens of a piece: few enough for short FFTs, and for all powers of the poles to be held.
PIECE_TOKENS = 64
# The number of pieces that are computed together.
_PIECES_AT_ONCE = 16


@dataclass(frozen=True, slots=True, eq=False)
class ShortFilter:
    """A causal depthwise filter. Its last tap is that of the current token."""

    weight: Tensor  # [K, C] float32
    bias: Tensor | None  # [C] float32

    def run(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """inputs [c, C] that follow a state [K - 1, C] -> outputs [c, C] in float32, and the next state."""
        num_tokens = len(inputs)
        padded = torch.cat((state, inputs))
        outputs = padded[:num_tokens] * self.weight[0]
        for tap in range(1, len(self.weight)):
            outputs.addcmul_(padded[tap : tap + num_tokens], self.weight[tap])
        return self._biased(outputs), padded[num_tokens:]

    def step(self, inputs: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """inputs [n, C], states [n, K - 1, C] -> outputs [n, C] in float32, and the next states."""
        padded = torch.cat((states, inputs[:, None]), 1)
        return self._biased((padded * self.weight).sum(1)), padded[:, 1:]

    def _biased(self, outputs: Tensor) -> Tensor:
        return outputs if self.bias is None else outputs.add_(self.bias)


class LongFilter:
    """poles and residues [S, D] complex64; skip [D] float32 is the factor with which the input is added to the output."""

    def __init__(self, poles: Tensor, residues: Tensor, skip: Tensor) -> None:
        self._poles = poles
        self._residues = residues
        self._skip = skip
        self._powers = powers(poles, PIECE_TOKENS + 1)
        self._taps = (self._powers[:-1] * residues).real.sum(1)  # [l, D]
        self._spectrum = torch.fft.rfft(self._taps, n=2 * PIECE_TOKENS, dim=0)

    @property
    def num_bytes(self) -> int:
        held = (self._poles, self._residues, self._skip, self._powers, self._taps, self._spectrum)
        return sum(tensor.nbytes for tensor in held)

    def run(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """inputs [c, D] float32 that follow a state [S, D] -> outputs [c, D], and the next state."""
        whole = len(inputs) - len(inputs) % PIECE_TOKENS
        outputs = []
        for pieces in inputs[:whole].view(-1, PIECE_TOKENS, inputs.shape[1]).split(_PIECES_AT_ONCE):
            if len(pieces):
                output, state = self._run_pieces(pieces, state)
                outputs.append(output.flatten(0, 1))
        if whole < len(inputs):
            output, state = self._run_pieces(inputs[None, whole:], state)
            outputs.append(output[0])
        return torch.cat(outputs).addcmul_(self._skip, inputs), state

    def step(self, inputs: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """inputs [n, D] float32, states [n, S, D] -> outputs [n, D], and the next states."""
        states = states * self._poles + inputs[:, None]
        return (states * self._residues).real.sum(1).addcmul_(self._skip, inputs), states

    def _run_pieces(self, pieces: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Consecutive pieces [m, l, D] that follow a state [S, D] -> outputs [m, l, D] without the skip, and the next state."""
        num_tokens = pieces.shape[1]
        # What each piece alone adds to the state at its end.
        ends = (self._powers[:num_tokens] * pieces.flip(1)[:, :, None]).sum(1)  # [m, S, D]
        before = []
        for end in ends:
            before.append(state)
            state = state * self._powers[num_tokens] + end
        carried = self._powers[1 : num_tokens + 1] * (self._residues * torch.stack(before))[:, None]
        return self._convolve(pieces).add_(carried.real.sum(2)), state

    def _convolve(self, pieces: Tensor) -> Tensor:
        """Convolves each piece [m, l, D] alone, as if nothing preceded it."""
        num_tokens = pieces.shape[1]
        size = 2 << (num_tokens - 1).bit_length()
        spectrum = self._spectrum
        if size < 2 * PIECE_TOKENS:
            spectrum = torch.fft.rfft(self._taps[:num_tokens], n=size, dim=0)
        product = torch.fft.rfft(pieces, n=size, dim=1) * spectrum
        convolved: Tensor = torch.fft.irfft(product, n=size, dim=1)[:, :num_tokens]
        return convolved


def powers(poles: Tensor, count: int) -> Tensor:
    """poles [S, D] complex64 -> their powers 0, 1, …: [count, S, D]. Zero to the power of 0 is one.

    The table is doubled step by step: every power is a product of few factors, so that the phase of a high power is as
    exact as that of a low one. The factors are squared in double precision.
    """
    table = torch.ones_like(poles)[None]
    factor = poles.to(torch.complex128)
    while len(table) < count:
        table = torch.cat((table, table * factor.to(poles.dtype)))
        factor = factor * factor
    return table[:count]


def complex_of(pairs: Tensor) -> Tensor:
    """Stored poles or residues, [D, S, 1, 2] with real and imaginary parts -> [S, D] complex64."""
    return torch.view_as_complex(pairs.float().contiguous()).squeeze(-1).t().contiguous()


def by_role(rows: Tensor, num_heads: int) -> Tensor:
    """Rows [C, …] that are ordered by head, and within it by x2, x1 and v -> those of x2 of all heads, then x1, then v."""
    grouped: Tensor = rows.unflatten(0, (num_heads, 3, -1))
    return grouped.transpose(0, 1).flatten(0, 2)

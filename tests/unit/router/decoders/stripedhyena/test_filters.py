"""The filters of a Hyena, against the recurrence itself: token by token, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from router.decoders.stripedhyena.filters import (
    PIECE_TOKENS,
    LongFilter,
    ShortFilter,
    by_role,
    complex_of,
    powers,
)

CHANNELS, MODES, TAPS = 6, 2, 3
LENGTHS = (1, 2, 3, 11, PIECE_TOKENS - 1, PIECE_TOKENS, PIECE_TOKENS + 1, 5 * PIECE_TOKENS + 7)


def make_modes(seed: int = 0, *, largest: float = 0.99) -> tuple[Tensor, Tensor, Tensor]:
    """poles and residues [S, D] complex64, skip [D]; real parts of either sign, imaginary parts that count."""
    generator = torch.Generator().manual_seed(seed)
    radius = largest * torch.rand(MODES, CHANNELS, generator=generator).sqrt()
    angle = 6 * torch.rand(MODES, CHANNELS, generator=generator)
    residues = torch.randn(MODES, CHANNELS, 2, generator=generator)
    skip = torch.randn(CHANNELS, generator=generator)
    return torch.polar(radius, angle), torch.view_as_complex(residues), skip


def make_inputs(num_tokens: int, width: int = CHANNELS, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def recurrence(inputs: Tensor, poles: Tensor, residues: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts by hand, one token after the other: outputs [c, D] and the state [S, D]."""
    p_re, p_im = poles.real.double(), poles.imag.double()
    r_re, r_im = residues.real.double(), residues.imag.double()
    re, im = torch.zeros_like(p_re), torch.zeros_like(p_re)
    outputs = []
    for row in inputs.double():
        re, im = p_re * re - p_im * im + row, p_re * im + p_im * re
        outputs.append((r_re * re - r_im * im).sum(0) + skip.double() * row)
    return torch.stack(outputs), torch.complex(re, im)


def new_state() -> Tensor:
    return torch.zeros(MODES, CHANNELS, dtype=torch.complex64)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    wider = torch.complex128 if actual.is_complex() else torch.float64
    torch.testing.assert_close(actual.to(wider), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_a_prompt_in_one_run_gives_what_the_recurrence_gives(num_tokens: int) -> None:
    modes, inputs = make_modes(), make_inputs(num_tokens)
    outputs, state = LongFilter(*modes).run(inputs, new_state())
    expected_outputs, expected_state = recurrence(inputs, *modes)
    assert_near(outputs, expected_outputs)
    assert_near(state, expected_state)


@pytest.mark.parametrize("num_tokens", [2, 3, 11, PIECE_TOKENS + 3])
def test_a_prompt_that_is_cut_anywhere_gives_the_same(num_tokens: int) -> None:
    modes, inputs = make_modes(), make_inputs(num_tokens)
    long = LongFilter(*modes)
    expected_outputs, expected_state = recurrence(inputs, *modes)
    for cut in range(1, num_tokens):
        first, state = long.run(inputs[:cut], new_state())
        second, state = long.run(inputs[cut:], state)
        assert_near(torch.cat((first, second)), expected_outputs)
        assert_near(state, expected_state)


def test_single_steps_of_many_sequences_go_on_from_where_their_prompts_ended() -> None:
    modes, prompts = make_modes(), [make_inputs(length, seed=length) for length in LENGTHS]
    long = LongFilter(*modes)
    following = [make_inputs(4, seed=100 + index) for index in range(len(prompts))]
    states = torch.stack([long.run(prompt, new_state())[1] for prompt in prompts])
    for step in range(4):
        outputs, states = long.step(torch.stack([rows[step] for rows in following]), states)
        for index, prompt in enumerate(prompts):
            expected, state = recurrence(torch.cat((prompt, following[index][: step + 1])), *modes)
            assert_near(outputs[index], expected[-1])
            assert_near(states[index], state)


def test_a_pole_of_zero_remembers_nothing_and_is_no_nan() -> None:
    poles, residues, skip = make_modes()
    poles = torch.zeros_like(poles)
    inputs = make_inputs(5)
    outputs, state = LongFilter(poles, residues, skip).run(inputs, new_state())
    torch.testing.assert_close(outputs, (residues.real.sum(0) + skip) * inputs)
    torch.testing.assert_close(state, inputs[-1].expand(MODES, -1).to(torch.complex64))
    assert powers(poles, 3)[0].eq(1).all() and powers(poles, 3)[1:].eq(0).all()


def test_high_powers_of_poles_near_the_unit_circle_keep_their_phase() -> None:
    poles, _, _ = make_modes(largest=1.0)
    poles = poles / poles.abs()
    exponents = torch.arange(2049, dtype=torch.float64)[:, None, None]
    expected = poles.to(torch.complex128) ** exponents
    torch.testing.assert_close(powers(poles, 2049).to(torch.complex128), expected, atol=2e-6, rtol=0)


def make_short(*, biased: bool = True) -> ShortFilter:
    return ShortFilter(make_inputs(TAPS, seed=5), make_inputs(1, seed=6)[0] if biased else None)


def correlation(inputs: Tensor, short: ShortFilter) -> Tensor:
    """[c, C] -> [c, C] in double precision, with zeros before the first token."""
    padded = torch.cat((torch.zeros(TAPS - 1, inputs.shape[1]), inputs)).double()
    bias = 0 if short.bias is None else short.bias.double()
    return torch.stack(
        [(padded[place : place + TAPS] * short.weight.double()).sum(0) + bias for place in range(len(inputs))]
    )


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 11])
def test_the_short_filter_sees_zeros_before_a_prompt_however_short_and_wherever_cut(
    num_tokens: int, biased: bool
) -> None:
    short, inputs = make_short(biased=biased), make_inputs(num_tokens)
    expected = correlation(inputs, short)
    for cut in range(num_tokens + 1):
        first, state = short.run(inputs[:cut], torch.zeros(TAPS - 1, CHANNELS))
        second, state = short.run(inputs[cut:], state)
        assert_near(torch.cat((first, second)), expected)
        padded = torch.cat((torch.zeros(TAPS - 1, CHANNELS), inputs))
        assert torch.equal(state, padded[num_tokens:])


def test_single_steps_of_the_short_filter_go_on_from_where_prompts_ended() -> None:
    short, prompts = make_short(), [make_inputs(length, seed=length) for length in (1, 2, 11)]
    states = torch.stack([short.run(prompt, torch.zeros(TAPS - 1, CHANNELS))[1] for prompt in prompts])
    following = make_inputs(3, seed=50)
    outputs, states = short.step(following, states)
    for prompt, row, output, state in zip(prompts, following, outputs, states, strict=True):
        whole = torch.cat((prompt, row[None]))
        assert_near(output, correlation(whole, short)[-1])
        assert torch.equal(state, torch.cat((torch.zeros(1, CHANNELS), whole))[-2:])


def test_bfloat16_rows_are_filtered_in_float32_and_remembered_as_they_came() -> None:
    short, inputs = make_short(), make_inputs(5).bfloat16()
    outputs, state = short.run(inputs, torch.zeros(TAPS - 1, CHANNELS, dtype=torch.bfloat16))
    assert outputs.dtype == torch.float32 and torch.equal(state, inputs[-2:])
    assert_near(outputs, correlation(inputs.float(), short))
    single, states = short.step(inputs[:1], state[None])
    assert single.dtype == torch.float32 and states.dtype == torch.bfloat16


def test_stored_pairs_become_complex_numbers_by_mode_and_channel() -> None:
    pairs = torch.randn(CHANNELS, MODES, 1, 2).bfloat16()
    modes = complex_of(pairs)
    assert modes.shape == (MODES, CHANNELS) and modes.dtype == torch.complex64
    assert modes[1, 4] == torch.complex(*pairs[4, 1, 0].float())


def test_rows_by_head_are_sorted_by_what_they_are_for() -> None:
    # 2 heads of 2 channels: x2, x1 and v of the first, then of the second.
    rows = torch.tensor([20, 21, 10, 11, 0, 1, 22, 23, 12, 13, 2, 3])
    assert by_role(rows, 2).tolist() == [20, 21, 22, 23, 10, 11, 12, 13, 0, 1, 2, 3]
    assert by_role(rows[:, None].expand(-1, 5), 2).shape == (12, 5)

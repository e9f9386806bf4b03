"""Random arguments for a scan, and the one comparison that every law of the state-space layer comes down to.

Letters: b batch, t time, h heads, g groups, p head_dim, n state size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.tolerances import NEGLIGIBLE, assert_close

DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "initial_state")


@dataclass(frozen=True)
class Case:
    """The arguments of one scan, in the shapes of `ssd_chunk_scan`; the last four may be None."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    initial_state: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    seq_idx: Tensor | None = None

    def scan(self, scan: Callable[..., tuple[Tensor, Tensor]], **options) -> tuple[Tensor, Tensor]:
        """What `scan` makes of this case: y and the final state."""
        return scan(
            *(self.x, self.dt, self.A, self.B, self.C),
            rotary=self.rotary,
            D=self.D,
            initial_state=self.initial_state,
            seq_idx=self.seq_idx,
            **options,
        )

    def map_time(self, change: Callable[[Tensor], Tensor]) -> "Case":
        """The case with `change` applied to every tensor that has a time axis, which is axis 1 of each."""
        changed = {name: change(getattr(self, name)) for name in ("x", "dt", "B", "C")}
        rotary = None if self.rotary is None else tuple(map(change, self.rotary))
        return replace(self, **changed, rotary=rotary, seq_idx=None if self.seq_idx is None else change(self.seq_idx))

    def tokens(self, start: int, stop: int) -> "Case":
        """Tokens start … stop − 1 of every row."""
        return self.map_time(lambda tensor: tensor[:, start:stop])

    def double(self) -> "Case":
        """The same numbers in float64."""
        doubled = {name: tensor.double() for name in DIFFERENTIABLE if (tensor := getattr(self, name)) is not None}
        return replace(self, **doubled, rotary=None if self.rotary is None else tuple(t.double() for t in self.rotary))


Law = Callable[[Case], tuple[Tensor, Tensor]]


def make_case(
    *,
    batch: int = 2,
    length: int = 19,
    groups: int = 2,
    heads_per_group: int = 2,
    head_dim: int = 3,
    state_size: int = 4,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    documents: Sequence[int] | None = None,
    without: Sequence[str] = (),
) -> Case:
    """A random case with every option except those named in `without`, packed only where `documents` gives lengths.

    dt and A are those of an initialised model: dt log-uniform in [1e-3, 0.1], A uniform in [−16, −1]. Everything is drawn on the
    device itself: a host would take longer to draw a real layer's inputs than a GPU to compute with them.
    """
    generator = torch.Generator(device).manual_seed(seed)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    heads = groups * heads_per_group

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device).to(dtype)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64, device=device)

    if documents is None:
        start = torch.randint(0, 1000, (batch, 1), generator=generator, device=device)
        positions = start + torch.arange(length, device=device)
        seq_idx = None
    else:
        length = sum(documents)
        positions = torch.cat([torch.arange(size) for size in documents])[None]
        # Numbers with gaps: a change means a new document, its size means nothing.
        numbers = 3 * torch.arange(len(documents))
        seq_idx = numbers.repeat_interleave(torch.tensor(documents)).expand(batch, -1).to(device)
    case = Case(
        x=normal(batch, length, heads, head_dim),
        dt=(10 ** uniform(-3, -1, batch, length, heads)).to(precise),
        A=-uniform(1, 16, heads).to(precise),
        B=normal(batch, length, groups, state_size),
        C=normal(batch, length, groups, state_size),
        D=normal(heads, dtype=precise),
        initial_state=normal(batch, heads, head_dim, state_size, dtype=precise),
        rotary=None if "rotary" in without else rotary_tables(positions, state_size, precise, device),
        seq_idx=seq_idx,
    )
    return replace(case, **dict.fromkeys(without))


def rotary_tables(
    positions: Tensor, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin of m·10000^(−2i/width), i = 0 … width/2 − 1 (Eq. 3): each (b, t, width/2)."""
    frequencies = [10000.0 ** (-2 * i / width) for i in range(width // 2)]
    angles = positions.to(device)[..., None] * torch.tensor(frequencies, dtype=torch.float64, device=device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def results(law: Law, case: Case) -> dict[str, Tensor]:
    """y, the final state, and the gradient of every floating input of `case` through both of them.

    The gradients that come in from above are random numbers that bfloat16 holds exactly, so that they are the same numbers
    in every precision.
    """
    leaves = {
        name: tensor.detach().requires_grad_() for name in DIFFERENTIABLE if (tensor := getattr(case, name)) is not None
    }
    outputs = law(replace(case, **leaves))
    generator = torch.Generator(case.x.device).manual_seed(1)
    incoming = [
        torch.randn(*output.shape, generator=generator, device=output.device).bfloat16().to(output.dtype)
        for output in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": outputs[0].detach(), "final state": outputs[1].detach(), **named}


def assert_equal_laws(actual: Law, expected: Law, case: Case, *, expected_case: Case | None = None) -> None:
    """Holds y, final state and all gradients of `actual` on `case` to those of `expected`, at the tolerance of x's dtype.

    `expected_case` gives the other side the same numbers in another precision.

    A's gradient is a sum over all tokens in which terms of both signs cancel. Since A and dt meet only in dt·A, the terms of
    A·∂/∂A are of the size of dt·∂/∂dt, and the sum of their sizes is what its error is measured by.
    """
    wanted = results(expected, expected_case or case)
    terms_of_A = (case.dt * wanted["gradient of dt"] / case.A).abs().sum((0, 1)).norm().item()
    for name, result in results(actual, case).items():
        scale = max(terms_of_A, NEGLIGIBLE) if name == "gradient of A" else NEGLIGIBLE
        assert_close(result, wanted[name], case.x.dtype, name, scale)

"""What an update rule is: a declaration of what it needs, and a few functions of tensors.

A *matrix rule* updates each channel (row, column or block of rows) of a matrix by
``U_c = f * (s_c * X_c + D_c P) + N_c P``: X is the *carrier*, the gradient G or a state by element made of it; ``s_c``
is one number a channel, ``D_c`` and ``N_c`` are r numbers a channel, all computed by the channel's owner; P is the
projection; f is one number a matrix, computed from sums over the whole matrix. Each part is there if it is declared.
With a D, answers travel after those sums, as ``f s_c`` and ``f D_c + N_c``; else the holders multiply by f. ``Spec``
declares what the owner must see, which state is kept, and what comes back. All else follows and knows no rule.

An *element rule* updates every element by itself, without exchange. Rules are tensors in, tensors out: no rank, tile or
collective is visible here, no function synchronizes with the host, and hyperparameters are the group's at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..kernels.table import Kernels
    from .options import Option

Group = Mapping[str, Any]  # a parameter group's options
NO_CARRIER = ""  # as ``Spec.carrier``


@dataclass(frozen=True)
class Reduce:
    """What a channel's owner sees, summed over the ranks that hold parts of the channel.

    Attributes:
        axis: along which dimension the channels lie: "rows", "columns", or "larger" (rows of a matrix with m >= n).
        low_rank: r, the number of columns of G P^T; 0 without a projection.
        projection: P's making: "gaussian" or "rademacher" entries from the seed; from a gradient "svd", or "subspace".
        projection_in_bfloat16: whether one that is made of a gradient is rounded to bfloat16.
        channel_norms: whether the owner sees each channel's norm.
        root_mean_square: whether that is the root of the mean square instead.
        of_carrier: whether all this is of the carrier X, and not of the gradient G.
        block: how many neighbouring rows, a divisor of m, are one channel; more than 1 only of "rows", unprojected.
        whole: whether one owner needs all of X, for ``whole_step``; then the axis is "rows", and all else is left out.
        whole_in_bfloat16: whether X and what ``whole_step`` makes of it are rounded to bfloat16, and travel so.
        gram: whether the owner sees P P^T, by which ``Seen.squares_of_products`` knows norms of low-rank updates.
    """

    axis: str = "larger"
    low_rank: int = 0
    projection: str = "gaussian"
    projection_in_bfloat16: bool = False
    channel_norms: bool = False
    root_mean_square: bool = False
    of_carrier: bool = False
    block: int = 1
    gram: bool = False
    whole: bool = False
    whole_in_bfloat16: bool = False

    def by_rows(self, m: int, n: int) -> bool:
        """Whether the channels of an m x n matrix are its rows."""
        return m >= n if self.axis == "larger" else self.axis == "rows"


@dataclass(frozen=True)
class Reply:
    """What comes back to the ranks that hold a matrix.

    Attributes:
        scale: whether each channel has a scaling factor s_c; without one it is 1.
        residual, direct: whether each channel has a D_c, which the factor of the matrix multiplies, and an N_c.
        terms: how many numbers of each matrix are summed over its owners for ``matrix_step``.
        matrix_norm: whether the squared norm of all that is reduced follows as the last term. The holders compute it.
    """

    scale: bool = False
    terms: int = 0
    matrix_norm: bool = False
    residual: bool = False
    direct: bool = False

    @property
    def low_rank_update(self) -> bool:
        """Whether r numbers of each channel come back."""
        return self.residual or self.direct

    def columns(self, low_rank: int) -> dict[str, slice]:
        """What an owner answers of a channel at rank ``low_rank``, by the names of ``Update``: where in its numbers."""
        found, at = {}, 0
        for name, width in (("scale", 1), ("residual", low_rank), ("direct", low_rank)):
            if getattr(self, name):
                found[name] = slice(at, at + width)
                at += width
        return found


@dataclass(frozen=True)
class State:
    """State of a matrix by name, zeros at first.

    Attributes:
        channel: kept by owners, with the width: (channels, width).
        matrix: one number, which every rank keeps.
        element: like the matrix, kept by the ranks that hold the elements.
    """

    channel: Mapping[str, int] = field(default_factory=dict)
    matrix: tuple[str, ...] = ()
    element: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return *self.matrix, *self.channel, *self.element


@dataclass(frozen=True)
class Spec:
    """All that a matrix rule declares for one matrix.

    Attributes:
        carrier: the name of the state by element that is X; None for the gradient; ``NO_CARRIER`` for no X, but N P.
    """

    reduce: Reduce = Reduce()
    reply: Reply = Reply()
    state: State = State()
    carrier: str | None = None

    @property
    def terms(self) -> int:
        """How many numbers ``matrix_step`` gets."""
        return self.reply.terms + int(self.reply.matrix_norm)

    def projection_shape(self, m: int, n: int) -> tuple[int, int] | None:
        """Of the P^T that ranks with a part of an m x n matrix keep; None where nothing is kept."""
        return (min(m, n), self.reduce.low_rank) if self.reduce.projection in ("svd", "subspace") else None


class Seen(NamedTuple):
    """What an owner knows of channels of one or several matrices, stacked.

    Attributes:
        low_rank: G P^T, or X P^T where the rule reduces the carrier, (channels, r).
        norms: of G or X by channel, (channels,), or None.
        workspace: uninitialized memory for the rule, like ``low_rank``.
        counts: how many of the channels are each matrix's; at least 1.
        step: counted from 1, of all these matrices, for a rule with ``reads_step``; else of any of them.
        grams: P P^T of each matrix, (r, r), where ``Reduce.gram`` asks for it.
        kernels: what the step computes with; None for torch's.
        made: what ``low_rank_step`` wrote, (numbers, channels), if there is one; then R is not here.
    """

    low_rank: Tensor
    norms: Tensor | None
    workspace: Tensor
    counts: list[int]
    step: int = 1
    grams: Sequence[Tensor] = ()
    kernels: Kernels | None = None
    made: Tensor | None = None

    def squares_of_products(self, low_rank: Tensor) -> Tensor:
        """The squared norm of each channel of A P for a low-rank A, (channels, r): (channels,)."""
        parts = torch.split(low_rank, self.counts)
        return torch.cat([((part @ gram) * part).sum(dim=1) for part, gram in zip(parts, self.grams, strict=True)])

    def square_sums(self, values: Tensor) -> Tensor:
        """The sum of squares of ``values``, (channels, ...), over each matrix's channels: (matrices,)."""
        return torch.stack(torch._foreach_norm(torch.split(values, self.counts))).square_()


class Update(NamedTuple):
    """What an owner answers: ``scale`` (channels,), ``terms`` (matrices, ``Reply.terms``), D and N (channels, r)."""

    scale: Tensor | None = None
    terms: Tensor | None = None
    residual: Tensor | None = None
    direct: Tensor | None = None


class MatrixRule:
    """A rule for matrices. Defaults: no state, no exchange, plain descent along the gradient.

    Attributes:
        name: for logs and checkpoints.
        options: that it reads from a parameter group, besides lr, weight_decay and maximize.
        chosen: whether its matrices are chosen: by a group's ``rank``, else by the library. Other rules take every
            matrix of their groups that ``takes`` accepts.
        decay_first: whether weight decay acts on the weight before the update, and not on the new weight.
        spec_options: the options that ``spec`` and ``takes`` read; when one changes, the step is planned anew.
        low_rank_numbers: how many numbers a channel ``owner_step`` gets of ``low_rank_step`` in place of R; 0 without.
        reads_step, reads_role: whether ``owner_step`` reads the number of steps, and the rule ``group["role"]``.
    """

    name: str
    options: Mapping[str, Option] = {}
    chosen = False
    decay_first = False
    spec_options: tuple[str, ...] = ()
    low_rank_numbers = 0
    reads_step = False
    reads_role = False

    def takes(self, shape: Sequence[int], group: Group) -> bool:
        """Whether it updates a parameter of that shape in a group; else the element rule does."""
        return len(shape) in (2, 3) and 0 not in shape

    def refuses_change(self, before: Group, now: Group) -> str:
        """Why the options of a group with state cannot change so; "" if they can."""
        return ""

    def spec(self, m: int, n: int, group: Group) -> Spec:
        """What an m x n matrix needs under a group's options."""
        raise NotImplementedError

    def element_step(self, grad: Tensor, state: Mapping[str, Tensor], group: Group) -> None:
        """Update state by element in place, before anything is reduced; tensors of one shape, a part of a matrix."""

    def source(self, grad: Tensor, state: Mapping[str, Tensor], group: Group) -> Tensor:
        """X of a part of a matrix that an owner needs whole, after ``element_step``; not changed in place."""
        return grad

    def whole_step(self, whole: Tensor, group: Group) -> Tensor:
        """U of a whole matrix, or what ``finish`` makes U of, from X, (m, n), for ``Reduce.whole``; a new tensor."""
        return whole

    def finish(self, part: Tensor, row: int, shape: tuple[int, int], group: Group) -> None:
        """Make U in place, at a holder, of rows from ``row`` on of what ``whole_step`` returned for an m x n matrix."""

    def low_rank_step(self, seen: Seen, state: Mapping[str, Tensor], group: Group, out: Tensor) -> None:
        """Update state with R of a few matrices, and write (``low_rank_numbers``, channels) for ``owner_step``."""

    def owner_step(self, seen: Seen, state: Mapping[str, Tensor], group: Group) -> Update:
        """Update the channels' state in place, each (channels, width), and return what the holders need."""
        return Update()

    def matrix_step(
        self, terms: Tensor, state: Mapping[str, Tensor], group: Group
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The factor f of each matrix, (matrices,) or None for 1, and the state that changes, by name; elementwise.

        Args:
            terms: (matrices, ``Spec.terms``), summed over ranks.
            state: by name, (matrices,); not to be changed, since matrices without a gradient keep theirs.
        """
        return None, {}

    def step_size(self, lr: Any, step: int, group: Group) -> Any:
        """What U is multiplied by: ``lr`` (a float, or a scalar tensor) with bias corrections at ``step``, from 1."""
        return lr

    def weight_decay(self, group: Group) -> float:
        """The decoupled weight decay of a parameter."""
        return float(group["weight_decay"])

    def gain(self, group: Group) -> float:
        """A constant that U is multiplied by as well."""
        return 1.0


class ElementRule:
    """A rule for all other parameters, element by element.

    Attributes:
        name, options, decay_first, spec_options: as of ``MatrixRule``.
        state: names of the tensors that it keeps, each like the parameter, zeros at first.
    """

    name: str
    options: Mapping[str, Option] = {}
    spec_options: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    decay_first = False

    def state_of(self, group: Group) -> tuple[str, ...]:
        """The names among ``state`` that a group's options need."""
        return self.state

    def state_dtype(self, group: Group) -> torch.dtype | None:
        """In which its state is kept, if that is not the dtype of the computation: torch.bfloat16."""
        return None

    def learning_rate(self, group: Group) -> Any:
        """A float, or a tensor of one number."""
        return group["lr"]

    def weight_decay(self, group: Group) -> float:
        """The decoupled weight decay, which is not the rule's work."""
        return float(group["weight_decay"])

    def refuses_change(self, before: Group, now: Group) -> str:
        """As of ``MatrixRule``."""
        return ""

    def adam(self, step: int, group: Group) -> tuple[float, float] | None:
        r"""c and eps of :math:`W - \eta c M / (\sqrt{V} + \epsilon)` if it is Adam's, with ``group["betas"]``."""

    def update(
        self, weights: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], step: int, group: Group
    ) -> None:
        """Update flat weights and state in place, without weight decay.

        Args:
            weights, grads: of equal lengths, one device and one dtype, float32 or float64.
            state: by name, like ``weights``.
            step: counted from 1, the same for all.
        """
        raise NotImplementedError


class Rules(NamedTuple):
    """The rules of a group: ``matrix`` for the matrices that it takes (None: for none), ``element`` for all others."""

    matrix: MatrixRule | None
    element: ElementRule

    @property
    def name(self) -> str:
        """For checkpoints, which continue only under rules of the same name."""
        return self.element.name if self.matrix is None else self.matrix.name

    @property
    def options(self) -> dict[str, Option]:
        """The options that either of them reads; where both read one, it is the matrix rule's."""
        return {**self.element.options, **(self.matrix.options if self.matrix is not None else {})}

    @property
    def matrix_options(self) -> set[str]:
        """The options that the matrix rule reads, and the element rule does not."""
        return set(self.options) - set(self.element.options)

    @property
    def spec_options(self) -> tuple[str, ...]:
        """The options by which a step is planned."""
        return *(self.matrix.spec_options if self.matrix is not None else ()), *self.element.spec_options

    @property
    def reads_role(self) -> bool:
        """Whether the matrix rule reads what a parameter is in its model."""
        return self.matrix is not None and self.matrix.reads_role

    def refuses_change(self, before: Group, now: Group) -> str:
        """Why the options of a group with state cannot change so; "" if they can."""
        return next(filter(None, (rule.refuses_change(before, now) for rule in self if rule is not None)), "")

    def rule_of(self, shape: Sequence[int], group: Group) -> MatrixRule | ElementRule:
        """The one that updates a parameter of that shape in a group."""
        return self.matrix if self.matrix is not None and self.matrix.takes(shape, group) else self.element

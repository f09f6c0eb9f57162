"""Where the samples of a packed row begin, and what each of its tokens sees."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastalign.ops._check import check_dim, check_same

_ROW = 2**32  # larger than any position, so that row * _ROW + position sorts by row first


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the samples of a packed row of T tokens begin, and where their tokens came from.

    Attributes:
        cu_seqlens: Offsets of the s segments, (s + 1,) int32, from 0 to T.
        lengths: Tokens of each segment, on the host.
        positions: Position of each token in its own unpacked sample, (T,) int64, ascending inside
            a segment. It is the column in the batch, not a rotary position.
        rows: Row of the batch that each token came from, (T,) int64, ascending over the segments:
            `x[segments.rows, segments.positions]` packs x (b, L, ...) into (T, ...).
        span: Largest `last - first + 1` of positions over the segments, on the host. A sliding
            window that is at least as long hides nothing.
        gapped_span: The same over the segments whose positions have gaps alone, 0 without any;
            None where that is not known.

    Raises:
        ValueError: Shapes or dtypes disagree. Values on the device are not read.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    rows: Tensor
    span: int
    gapped_span: int | None = None
    _made: dict[tuple[str, int | None], Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        total = sum(self.lengths)
        for name, shape, dtype in (
            ("cu_seqlens", (len(self.lengths) + 1,), torch.int32),
            ("positions", (total,), torch.int64),
            ("rows", (total,), torch.int64),
        ):
            tensor: Tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} must be {shape} of {dtype} for segments of lengths {self.lengths}: "
                    f"got {tuple(tensor.shape)} of {tensor.dtype}"
                )
        check_same("device", cu_seqlens=self.cu_seqlens, positions=self.positions, rows=self.rows)

    @classmethod
    def from_mask(cls, keep: Tensor) -> "Segments":
        """The kept tokens of a batch, row by row; a row that keeps none gives no segment.

        Waits for the device once.

        Args:
            keep: Tokens that are packed, (b, L) bool.

        Raises:
            ValueError: `keep` is not a 2-D mask of bool.
        """
        check_dim("keep", keep, 2)
        if keep.dtype != torch.bool:
            raise ValueError(f"keep must be a mask of torch.bool: got {keep.dtype}")
        keep = keep if keep.shape[1] else keep.new_zeros((len(keep), 1))
        width = keep.shape[1]
        columns = torch.arange(width, device=keep.device)
        first = torch.where(keep, columns, width).amin(1)
        last = torch.where(keep, columns, -1).amax(1)
        table = torch.stack((keep.sum(1), last - first + 1), 1).tolist()
        lengths = tuple(count for count, _ in table if count)
        # A stable sort brings the kept tokens to the front, in their order, at a known length.
        index = (~keep).flatten().to(torch.uint8).argsort(stable=True)[: sum(lengths)]
        offsets = torch.tensor((0, *lengths)).cumsum(0).to(keep.device, torch.int32)
        span = max((span for count, span in table if count), default=0)
        gapped = max((span for count, span in table if span > count > 0), default=0)
        return cls(offsets, lengths, index % width, index // width, span, gapped)

    def counts_tokens(self, window: int) -> bool:
        """Whether so many positions hide the same keys as so many tokens.

        They do where positions have no gaps, and where neither hides anything.
        """
        return window >= (self.span if self.gapped_span is None else self.gapped_span)

    def first_keys(self, window: int | None) -> Tensor:
        """Index of the first key of each query, (T,) int64: it sees all from there to itself.

        As positions ascend inside a segment, what a query sees is one interval, window or not.
        """
        order = self.rows * _ROW + self.positions
        reach = self.positions if window is None else self.positions.clamp(max=window - 1)
        return torch.searchsorted(order, order - reach)

    def masks(self, window: int | None) -> list[Tensor]:
        """What the queries of each segment see, (length, length) bool; made once."""

        def make() -> list[Tensor]:
            index = torch.arange(len(self.rows), device=self.rows.device)
            pairs = torch.stack((index, self.first_keys(window)), 1)
            return [
                (pair[:, 0] <= pair[:, :1]) & (pair[:, 0] >= pair[:, 1:])
                for pair in torch.split(pairs, list(self.lengths))
            ]

        masks: list[Tensor] = self.once("masks", window, make)
        return masks

    def block_mask(self, window: int | None) -> Any:
        """The `BlockMask` of flex attention; made once."""
        from torch.nn.attention.flex_attention import create_block_mask

        def make() -> Any:
            first, total = self.first_keys(window), len(self.rows)

            def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return (j <= i) & (j >= first[i])

            return create_block_mask(seen, None, None, total, total, device=str(first.device))

        return self.once("block", window, make)

    def once(self, kind: str, window: int | None, make: Callable[[], Any]) -> Any:
        """What `make` gives, kept with the segments: every layer asks for the same."""
        if (kind, window) not in self._made:
            self._made[kind, window] = make()
        return self._made[kind, window]

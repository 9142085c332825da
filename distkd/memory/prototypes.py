"""A few unit codes per class, running means of a teacher's embeddings, the same on every rank at every step.

Written once after the step from the rows of all ranks, which travel in the packed gather that every memory uses. An
all-reduce of sums would be fewer bytes where the global batch has more than 2 x C x M samples; the gather is kept
because it runs beside the backward, and because all ranks then take the sum in one order, at every world size.
"""

# Shapes: G samples of all ranks and passes, C classes, M codes of a class, S = C x M, D embedding

from __future__ import annotations

import torch
from torch import Tensor

from distkd.errors import ConfigError, ShapeError
from distkd.memory.memory import Memory
from distkd.ops.prototypes import choose_codes, unit_codes

__all__ = ["Prototypes"]


class Prototypes(Memory):
    """Sums of the embeddings of each code, older ones counting less; a code is the direction of its sum.

    A code is unknown until its first sample, and the directions are those of running means in which every sample of a
    step counts the same.
    """

    sum_CMD: Tensor

    def __init__(self, n_classes: int, dim: int, *, per_class: int = 1, momentum: float):
        """Nothing known yet.

        Args:
            n_classes: C.
            dim: D.
            per_class: M.
            momentum: what is left of a code's sum at a step that adds to it, 0 <= momentum < 1; a step that has no
                sample for a code leaves it as it is.
        """
        super().__init__()
        if n_classes < 2 or dim < 1 or per_class < 1 or not 0 <= momentum < 1:
            raise ConfigError(
                f"prototypes of {n_classes} classes, {per_class} per class, width {dim}, momentum {momentum}; expected "
                "at least two classes, at least one code per class and 0 <= momentum < 1"
            )
        self.register_buffer("sum_CMD", torch.zeros(n_classes, per_class, dim))
        self.momentum = momentum

    def codes(self) -> tuple[Tensor, Tensor]:
        """Unit codes (C, M, D), and which of them are known, bool (C, M); zeros elsewhere. No host sync."""
        return unit_codes(self.sum_CMD)

    @torch.no_grad()
    def update(self, embedding_GD: Tensor, label_G: Tensor) -> None:
        """Add a step's embeddings to the codes of their classes. No collective, no host sync.

        Args:
            embedding_GD: unit embeddings in the order of the global batch, the same on every rank; rows of zeros add
                nothing.
            label_G: int64 class < C; negative ones are passed over.

        Raises:
            ShapeError: D differs, or there is not one label for each embedding.
        """
        n_classes, per_class, dim = self.sum_CMD.shape
        if embedding_GD.dim() != 2 or embedding_GD.shape[1] != dim or len(label_G) != len(embedding_GD):
            raise ShapeError(
                f"embeddings of shape {tuple(embedding_GD.shape)} with {len(label_G)} labels do not fit prototypes of "
                f"width {dim}, expected (G, {dim}) and G labels"
            )
        embedding_GD = embedding_GD.to(self.sum_CMD.dtype)
        code_G = choose_codes(embedding_GD, label_G, *self.codes())
        place_G = label_G * per_class + code_G  # of a negative label negative, and so nowhere
        # a product, not a scatter: on CUDA a scatter's sum has no fixed order
        belongs_SG = torch.arange(n_classes * per_class, device=label_G.device)[:, None] == place_G
        added_SD = belongs_SG.to(embedding_GD.dtype) @ embedding_GD
        moved_SD = self.momentum * self.sum_CMD.view(-1, dim) + added_SD
        moved_SD = torch.where(belongs_SG.any(dim=1, keepdim=True), moved_SD, self.sum_CMD.view(-1, dim))
        self.sum_CMD.copy_(moved_SD.view_as(self.sum_CMD))

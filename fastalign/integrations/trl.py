"""SFT and CAL in TRL's supervised fine-tuning trainer, on vision datasets as it takes them."""

from collections.abc import Mapping
from typing import Any

from trl import SFTTrainer

from fastalign.integrations.transformers import AlignmentMixin


class AlignmentSFTTrainer(AlignmentMixin, SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` with `objective="sft" | "cal" | "deepalign"`; see `AlignmentMixin`.

    Datasets, collators, PEFT and the other settings are TRL's. Its loss is not used: no entropy or
    `mean_token_accuracy` is logged (the objective logs "accuracy"), and `loss_type` must stay at
    its default. Image tokens, which TRL's collator leaves in the labels of conversations without
    `assistant_only_loss`, are not trained on.

    Raises:
        ValueError: As `AlignmentMixin`; or `loss_type`, packing or padding-free batches are asked
            for.
    """

    def _check_columns(self) -> None:
        """TRL keeps the columns of a vision dataset itself."""
        args = self.args
        if args.loss_type != "nll":
            raise ValueError(
                f'loss_type must be "nll", since the objective makes the loss: got {args.loss_type}'
            )
        if args.packing or args.padding_free:
            raise ValueError(
                "packing and padding_free must be False: the objective takes one sample a row"
            )

    def _batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        batch = dict(inputs)
        image = self._view().vision_mask(batch)
        batch["labels"] = batch["labels"].masked_fill(image, -100)
        return batch

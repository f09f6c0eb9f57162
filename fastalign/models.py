"""One view of every image-text-to-text model of transformers.

Only public accessors and temporary hooks are used: no model class is patched, no forward is copied.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import ops

Batch = Mapping[str, Any]

IGNORE_INDEX = -100
CONTRAST_MODES = ("drop", "mask")
# What a decoder may be handed and the image-free branch knows how to cut; flags are passed on.
_CUT = {"inputs_embeds", "input_ids", "position_ids", "attention_mask", "past_key_values"}


@dataclass(frozen=True)
class Forward:
    """What one pass through a model left behind.

    Attributes:
        hidden: Output of the decoder after its final norm, (b, L, d).
        layers: Outputs of the decoder layers that were asked for, {k: (b, L, d)}, k from 1.
        decoder_inputs: The keyword arguments that the model handed to its decoder.
    """

    hidden: Tensor
    layers: dict[int, Tensor]
    decoder_inputs: dict[str, Any]


def layer_stack(module: nn.Module) -> nn.ModuleList:
    """The layers of a decoder or an encoder: its longest `nn.ModuleList`."""
    stacks = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    if not stacks:
        raise TypeError(f"{type(module).__name__} holds no nn.ModuleList of layers")
    return max(stacks, key=len)


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a layer's output, which is a tensor or a tuple that begins with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradient, and every module's own mode restored afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class VLM:
    """A vision-language model seen through its decoder, its vision tower and its image tokens.

    The model is not modified. A batch is what its processor makes: `input_ids` and `attention_mask`
    (b, L), `pixel_values` (absent when no sample has an image) and, for training, `labels` (b, L)
    with -100 where no token is to be predicted.

    Args:
        model: Any image-text-to-text model of transformers (`LlavaForConditionalGeneration`, ...).

    Raises:
        TypeError: The model offers no decoder, vision tower, output embedding or image token.
    """

    def __init__(self, model: nn.Module) -> None:
        for accessor in ("get_decoder", "get_encoder", "get_output_embeddings", "config"):
            if not hasattr(model, accessor):
                raise TypeError(
                    f"model must be an image-text-to-text model of transformers >= 5.17: "
                    f"{type(model).__name__} has no {accessor}"
                )
        model_any: Any = model
        self.model = model_any
        self.config = model_any.config
        self.decoder: Any = model_any.get_decoder()
        self.vision_tower: Any = model_any.get_encoder(modality="image")
        if self.vision_tower is model or self.vision_tower is None:
            raise TypeError(f"model must have a vision tower: {type(model).__name__} is text-only")
        self.head: Any = model_any.get_output_embeddings()
        if not isinstance(self.head, nn.Linear):
            raise TypeError(
                "the output embedding must be a plain nn.Linear: got "
                f"{type(self.head).__name__}; merge or remove adapters on the head first"
            )
        token = getattr(self.config, "image_token_id", None)
        if not isinstance(token, int):
            raise TypeError(f"{type(self.config).__name__} has no image_token_id")
        self.image_token_id: int = token
        text = self.config.get_text_config()
        self.layers = layer_stack(self.decoder)
        self.num_layers = len(self.layers)
        self.hidden_size: int = text.hidden_size
        named = inspect.signature(model.forward).parameters
        self._inputs = frozenset(named) - {"labels", "logits_to_keep", "use_cache"}
        self.softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self.logit_scale: float = getattr(text, "logit_scale", None) or 1.0

    # Where the modalities are

    def vision_mask(self, batch: Batch) -> Tensor:
        """True at image tokens, (b, L)."""
        return torch.eq(batch["input_ids"], self.image_token_id)

    def text_mask(self, batch: Batch) -> Tensor:
        """True at text tokens that are no padding, (b, L)."""
        return self._attended(batch) & ~self.vision_mask(batch)

    @staticmethod
    def _attended(batch: Batch) -> Tensor:
        mask = batch.get("attention_mask")
        if mask is None:
            return torch.ones_like(batch["input_ids"], dtype=torch.bool)
        attended: Tensor = mask.bool()
        return attended

    def patch_grid(self, batch: Batch) -> tuple[int, int]:
        """Rows and columns of the image tokens of each image of the batch.

        Raises:
            ValueError: The batch has no image, or its image tokens are not one per patch.
        """
        pixels = batch.get("pixel_values")
        if pixels is None:
            raise ValueError("batch has no pixel_values: a patch grid needs images")
        side = self.config.vision_config.patch_size
        height, width = pixels.shape[-2] // side, pixels.shape[-1] // side
        tokens = int(self.vision_mask(batch).sum())
        if tokens != len(pixels) * height * width:
            raise ValueError(
                f"image tokens must be one per patch: got {tokens} for {len(pixels)} images of "
                f"{height} x {width} patches"
            )
        return height, width

    def image_patches(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states of the image tokens, image by image, (images, h * w, d)."""
        height, width = self.patch_grid(batch)
        return hidden[self.vision_mask(batch)].view(-1, height * width, hidden.shape[-1])

    def label_rows(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Where labels are predicted: sample (m,), predicting column (m,), label (m,).

        Row-major; a label in column 0 has no predictor and never counts.

        Raises:
            ValueError: The batch has no labels, or a label is an image token.
        """
        if batch.get("labels") is None:
            raise ValueError("batch must hold labels, (b, L) with -100 where none: got none")
        labels: Tensor = batch["labels"]
        if labels.shape != batch["input_ids"].shape:
            raise ValueError(
                "labels must have the shape of input_ids: got "
                f"{tuple(labels.shape)} and {tuple(batch['input_ids'].shape)}"
            )
        rows, cols = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        picked = labels[rows, cols + 1]
        if (picked == self.image_token_id).any():
            raise ValueError(
                f"labels must not hold the image token {self.image_token_id}: "
                f"set the labels of image tokens to {IGNORE_INDEX}"
            )
        return rows, cols, picked

    # Passes

    def forward(self, batch: Batch, layers: Sequence[int] = ()) -> Forward:
        """Run the model without its logits and keep the outputs of some decoder layers.

        Args:
            batch: See the class; `labels` are not passed on.
            layers: Which layers to keep, 1 to `num_layers`; the last is taken after the final norm.

        Raises:
            ValueError: A layer does not exist.
        """
        for k in layers:
            if not 1 <= k <= self.num_layers:
                raise ValueError(f"layers must lie in 1..{self.num_layers}: got {k}")
        kept: dict[int, Tensor] = {}
        seen: dict[str, Any] = {}

        def keep(k: int) -> Any:
            return lambda module, args, output: kept.update({k: first_tensor(output)})

        handles = [
            self.layers[k - 1].register_forward_hook(keep(k)) for k in layers if k < self.num_layers
        ]
        handles.append(
            self.decoder.register_forward_pre_hook(
                lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
            )
        )
        handles.append(
            self.decoder.register_forward_hook(
                lambda module, args, output: kept.update({self.num_layers: output[0]})
            )
        )
        inputs = {k: v for k, v in batch.items() if k in self._inputs}
        try:
            self.model(**inputs, logits_to_keep=1, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return Forward(kept[self.num_layers], {k: kept[k] for k in layers}, seen)

    def hidden_states(self, batch: Batch, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Outputs of decoder layers, each (b, L, d); all of 1..`num_layers` unless chosen.

        They equal `hidden_states[1:]` of transformers: the last is after the final norm, and the
        embedding is no layer.
        """
        chosen = tuple(range(1, self.num_layers + 1) if layers is None else layers)
        out = self.forward(batch, chosen)
        return [out.layers[k] for k in chosen]

    def label_logits(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Logit of one token per row, (m, d), (m,) -> (m,) float32 (float64 of float64)."""
        logits = ops.label_logits(hidden, self.head.weight, labels, self.head.bias)
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    # Contrast

    @torch.no_grad()
    def contrast(self, batch: Batch, mode: str = "drop") -> Tensor:
        r"""How much the image raises each label's logit (CAL, NeurIPS 2024, Algorithm 1).

        $\delta_j = \mathrm{logit}(t_j \mid image, t_{<j}) - \mathrm{logit}(t_j \mid t_{<j})$, raw
        logits, in evaluation mode. Exactly 0 for samples without an image, for labels before the
        first image and for labels with no text before them.

        Args:
            batch: With `labels`; see the class.
            mode: "drop" removes the image tokens and keeps the position of every other token;
                "mask" leaves them in place, hidden as keys, as the released code does: the label
                right after an image then still sees it through its own residual stream.

        Returns:
            (m,) float32, one per label that is not -100, in row-major order of `labels`.
        """
        with evaluating(self.model):
            return self.contrast_from(batch, self.forward(batch), mode)

    @torch.no_grad()
    def contrast_from(self, batch: Batch, out: Forward, mode: str = "drop") -> Tensor:
        """`contrast`, given the pass with the image."""
        rows, cols, labels = self.label_rows(batch)
        with_image = self.label_logits(out.hidden[rows, cols], labels)
        if mode == "mask":
            hidden = self._masked(batch, out)[rows, cols]
            return (with_image - self.label_logits(hidden, labels)).float()
        if mode != "drop":
            raise ValueError(f"mode must be one of {CONTRAST_MODES}: got {mode!r}")
        image = self.vision_mask(batch)
        text = self.text_mask(batch)
        # The last text token at or before the predictor is the predictor without the image.
        place = text.cumsum(1) - 1
        active = (image.cumsum(1) > 0)[rows, cols] & (place[rows, cols] >= 0)
        delta = torch.zeros_like(with_image)
        if active.any():
            chosen, at = rows[active], cols[active]
            samples, sample_of = torch.unique(chosen, return_inverse=True)
            hidden = self._dropped(out, text[samples], samples)
            without = self.label_logits(hidden[sample_of, place[chosen, at]], labels[active])
            delta[active] = with_image[active] - without
        return delta.float()

    def _masked(self, batch: Batch, out: Forward) -> Tensor:
        """Hidden states (b, L, d) with the image tokens hidden as keys."""
        inputs = self._cuttable(out)
        length = inputs["inputs_embeds"].shape[1]
        return self._decode(
            inputs["inputs_embeds"],
            self._positions(inputs, length),
            self.text_mask(batch).to(torch.long),
        )

    def _dropped(self, out: Forward, text: Tensor, samples: Tensor) -> Tensor:
        """Hidden states (samples, longest, d) of the text tokens alone, positions kept."""
        inputs = self._cuttable(out)
        length = text.shape[1]
        longest = int(text.sum(1).max())
        # A stable sort brings the text tokens of each sample to the front, in their order.
        order = torch.sort((~text).to(torch.uint8), dim=1, stable=True).indices[:, :longest]
        embeds = inputs["inputs_embeds"][samples[:, None], order]
        positions = self._positions(inputs, length).expand(len(out.hidden), length)
        mask = torch.gather(text, 1, order).to(torch.long)
        return self._decode(embeds, positions[samples[:, None], order], mask)

    def _cuttable(self, out: Forward) -> dict[str, Any]:
        """The decoder's inputs, after a check that dropping tokens from them means something."""
        inputs = out.decoder_inputs
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        unknown = {k for k, v in inputs.items() if isinstance(v, Tensor)} - _CUT
        plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if unknown or not plain or (positions is not None and positions.dim() != 2):
            raise ValueError(
                f"contrast supports decoders with a 2-D mask and 1-D positions: "
                f"{type(self.model).__name__} hands its decoder "
                f"{sorted(unknown) or 'its own masks or multi-axis positions'}"
            )
        return inputs

    @staticmethod
    def _positions(inputs: dict[str, Any], length: int) -> Tensor:
        """Position ids (1 or b, L): those that the decoder was handed, else 0, 1, 2, ..."""
        positions = inputs.get("position_ids")
        if positions is None:
            device = inputs["inputs_embeds"].device
            positions = torch.arange(length, device=device)[None]
        return positions

    def _decode(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        # A 2-D mask also keeps transformers from reading gaps in the positions as packing.
        with evaluating(self.decoder):
            out = self.decoder(
                inputs_embeds=embeds,
                position_ids=positions,
                attention_mask=mask,
                use_cache=False,
            )
        hidden: Tensor = out[0]
        return hidden

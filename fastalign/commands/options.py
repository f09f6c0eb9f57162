"""The options of `fastalign diagnose`, one table for each of its diagnostics."""

from dataclasses import dataclass
from pathlib import Path

from fastalign.settings import Source


@dataclass(kw_only=True)
class Samples(Source):
    """Images with texts: pairs drawn from two folders, or records of a file.

    Attributes:
        images: Folder of images, together with `texts`.
        texts: Folder of .txt files, or of .jsonl files with "text" in each line; or one such file.
        data: JSON or JSONL file of LLaVA-style or caption records, in place of both folders.
        image_root: Folder that the image paths of `data` start from; the file's own by default.
        samples: Pairs or records, drawn at random as far as there are any.
        batch_size: Samples in a batch.
        max_length: Tokens after which a text is cut; what the model can take by default.
        seed: Of the choice of samples.
    """

    images: Path | None = None
    texts: Path | None = None
    data: Path | None = None
    image_root: Path | None = None
    samples: int = 100
    batch_size: int = 8
    max_length: int | None = None
    seed: int = 0


@dataclass(kw_only=True)
class Gap(Samples):
    """Distance and cosine of the centroids of vision and text tokens, layer by layer."""


@dataclass(kw_only=True)
class Embedding(Samples):
    """Vision and text tokens in the plane by t-SNE, a panel for each layer.

    Attributes:
        layers: Decoder layers, 0 for its input; the first, the middle and the last by default.
        tokens: Of each modality, at most.
        perplexity: Of t-SNE.
    """

    layers: tuple[int, ...] = ()
    tokens: int = 500
    perplexity: float = 30.0


@dataclass(kw_only=True)
class Attention(Source):
    """Share of attention that the tokens of a text put on an image, by layer and head, and its map.

    Attributes:
        image: Image file.
        text: Its caption; the attention of its tokens is taken.
        prompt: The question before the caption, if any.
        layer: Of the map in the figure; that with the largest share by default.
        view: Which picture the map shows, where an image is cut into tiles.
    """

    image: Path
    text: str
    prompt: str = ""
    layer: int | None = None
    view: int = 0


@dataclass(kw_only=True)
class Words(Source):
    """The vocabulary's words nearest to each patch of an image, at some layers (logit lens).

    Attributes:
        image: Image file.
        text: The answer behind the image, which models that read left to right do not see there.
        prompt: The question behind the image, if any.
        layers: 0 (the decoder's input) to the last; 0, the middle and the last by default.
        top: Words for each patch.
        view: Which picture is shown, where an image is cut into tiles.
    """

    image: Path
    text: str = "A photo."
    prompt: str = ""
    layers: tuple[int, ...] = ()
    top: int = 5
    view: int = 0


@dataclass(kw_only=True)
class Probe(Source):
    """Accuracy of a linear classifier on the mean visual state of an image, layer by layer.

    Attributes:
        images: Folder with a sub-folder of images for each class, as ImageNet has them.
        per_class: Images of a class, at most, drawn at random; all by default.
        layers: 0 (the decoder's input) to the last; all by default.
        folds: Of the cross-validation.
        regularization: C of the logistic regression; smaller is stronger.
        batch_size: Images in a batch.
        text: The answer behind each image, the same for all.
        seed: Of the choice of images, the folds and the shuffled control.
    """

    images: Path
    per_class: int | None = None
    layers: tuple[int, ...] = ()
    folds: int = 5
    regularization: float = 1.0
    batch_size: int = 8
    text: str = "A photo."
    seed: int = 0


@dataclass(kw_only=True)
class Perplexity(Source):
    """Perplexity on running text, with the adapter and without it where one is given.

    Attributes:
        texts: A .txt file (one text), a .jsonl file ("text" in each line) or a folder of them.
        window: Tokens of a window; 1024 by default, or what the model can take if that is less.
        stride: Tokens from one window to the next; half a window by default.
        batch_size: Windows in a batch.
        max_tokens: End after so many tokens.
        image: Image file that is put before every window; none by default. An adapter that acts on
            images changes nothing without one.
    """

    texts: Path
    image: Path | None = None
    window: int | None = None
    stride: int | None = None
    batch_size: int = 8
    max_tokens: int | None = None


@dataclass(kw_only=True)
class Blind(Source):
    """Accuracy of answers with the right image, with another's, and with none.

    Attributes:
        data: JSON or JSONL file of LLaVA-style or caption records; those with images are taken.
        image_root: Folder that the image paths start from; the file's own by default.
        samples: Records, drawn at random as far as there are any.
        batch_size: Records in a batch.
        max_length: Tokens after which an answer is cut; what the model can take by default.
        seed: Of the choice of records.
    """

    data: Path
    image_root: Path | None = None
    samples: int = 200
    batch_size: int = 8
    max_length: int | None = None
    seed: int = 0

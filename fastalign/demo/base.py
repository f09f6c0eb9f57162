"""The demo's model: a 2.8 M-parameter LLaVA of transformers' own classes, and its processor.

Nothing is special about it: the folder that `save_base` writes loads with AutoProcessor and
AutoModelForImageTextToText like any other checkpoint, and nothing here opens a connection.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fastalign.demo.scenes import ASSETS, IMAGE_SIZE, vocabulary

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

BASE = ASSETS / "base"
PATCH_SIZE = 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")
MAX_LENGTH = 256

# An answer starts where the generation prompt ends, so a prompt is a prefix of its continuation.
CHAT_TEMPLATE = """\
{{- '<bos>' -}}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {{- '<image>' if part['type'] == 'image' else part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}{{- '<eos>' -}}{%- endif -%}
{%- endfor -%}"""


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """The model with random weights, float32; the caller's random state is left as it was.

    CLIP vision tower of 4 layers and width 128 on 8 x 8 patches of 64 pixels (64 image tokens),
    Llama of 4 layers and width 192 with tied embeddings, and LLaVA's two-layer projector.

    Args:
        seed: The weights; the same seed gives the same weights.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(vocabulary()),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


def build_processor() -> LlavaProcessor:
    """Images of any size to (3, 64, 64) pixels, and one token a word.

    The image processor is the one on Pillow, so torchvision is not needed. The tokenizer knows the
    words of the captions, splits at white space and adds nothing; the chat template writes `<bos>`,
    and `<eos>` after each answer.

    Raises:
        ImportError: transformers is not installed.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
    from transformers import LlavaProcessor as Processor

    words = [*SPECIAL_TOKENS, *vocabulary()]
    words_to_ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(words_to_ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    processor = cast(Any, Processor)(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return cast("LlavaProcessor", processor)


def save_base(model: LlavaForConditionalGeneration, folder: str | Path) -> None:
    """Writes the model in bfloat16 safetensors (5.6 MB) and its processor; `model` is not changed.

    Args:
        model: A model of `build_model`.
        folder: Made where it does not exist.
    """
    half: Any = copy.deepcopy(model)
    half.to(torch.bfloat16).save_pretrained(folder)
    build_processor().save_pretrained(folder)


def load_base(
    folder: str | Path | None = None, *, dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """The shipped base model, or one that `save_base` wrote, on the CPU and in evaluation mode.

    Args:
        folder: None for the shipped one.
        dtype: Of the weights in memory; the file is bfloat16.

    Raises:
        FileNotFoundError: `folder` holds no model.
        ImportError: transformers is not installed.
    """
    from transformers import LlavaForConditionalGeneration

    path = BASE if folder is None else Path(folder)
    missing = [n for n in ("config.json", "model.safetensors") if not (path / n).is_file()]
    if missing:
        raise FileNotFoundError(
            f"folder must hold a model that save_base wrote: {path} lacks {' and '.join(missing)}; "
            "train one from build_model(seed) and save it there"
        )
    return LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, local_files_only=True)

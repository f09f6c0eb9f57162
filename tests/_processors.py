"""Processors of the model families, made from transformers' classes without a download.

Their tokens are those of `fastalign.testing.families`: words w5 to w490, special ones from 500 on.
Image processors are the ones on Pillow. Video processors need torchvision: where a class wants
one it gets an object that can do nothing. Missing are Mistral 3 and LFM2-VL, whose images need
torchvision too, and SmolVLM, whose processor needs num2words.
"""

from types import SimpleNamespace

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fastalign.testing._families_models import PATCH, QUERIES, SIDE, TILINGS
from fastalign.testing.families import FIRST_TEXT

CHAT = (  # w10 begins a user's turn and w11 an answer
    "{{ bos_token }}{% for m in messages %}{{ ' w10 ' if m.role == 'user' else ' w11 ' }}"
    "{% for c in m.content %}{{ 'IMAGE ' if c.type == 'image' else c.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' w11 ' }}{% endif %}"
)
SQUARE = {"height": SIDE, "width": SIDE}
QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def tokenizer(specials, *, bos=False, **attributes):
    """One token a word; `specials` have the ids from 500 on; `bos` as Llama's, put first."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "w4": 4}
    words |= {f"w{i}": i for i in range(FIRST_TEXT, 500)}
    words |= {name: 500 + i for i, name in enumerate(specials)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
        )
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, extra_special_tokens=attributes, model_max_length=1024, **names
    )
    made.add_special_tokens({"additional_special_tokens": list(specials)})
    assert made.convert_tokens_to_ids(specials[-1]) == 499 + len(specials)
    return made


def without_video(name, image_processor, tokenizer, **settings):
    """The processor class `name` with nothing for videos."""

    def unchecked(self, argument, value):
        return type(value)

    cls = type(name, (getattr(hf, name),), {"check_argument_for_proper_class": unchecked})
    return cls(image_processor, tokenizer, SimpleNamespace(model_input_names=[]), **settings)


def _chat(image):
    return CHAT.replace("IMAGE", image)


def _llava():
    pixels = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return hf.LlavaProcessor(
        pixels,
        tokenizer(["<image>"]),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat("<image>"),
    )


def _llava_next():
    pixels = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=TILINGS
    )
    return hf.LlavaNextProcessor(
        pixels,
        tokenizer(["<image>"]),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat("<image>"),
    )


def _llava_onevision():
    pixels = hf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=TILINGS)
    return without_video(
        "LlavaOnevisionProcessor",
        pixels,
        tokenizer(["<image>", "<video>"]),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_chat("<image>"),
    )


def _internvl():
    names = ("<IMG_CONTEXT>", "<video>", "<img>", "</img>")
    kinds = ("context_image_token", "video_token", "start_image_token", "end_image_token")
    pixels = hf.GotOcr2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2
    )
    return without_video(
        "InternVLProcessor",
        pixels,
        tokenizer(names, **dict(zip(kinds, names, strict=True))),
        image_seq_length=4,
        chat_template=_chat("<IMG_CONTEXT>"),
    )


def _qwen(name):
    pixels = hf.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    )
    template = _chat("<|vision_start|><|image_pad|><|vision_end|>")
    return without_video(name, pixels, tokenizer(QWEN), chat_template=template)


def _idefics3():
    tiles = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    names = ["<image>", "<video>", "<fake_token_around_image>", "<global-img>"]
    names += ["<end_of_utterance>", *tiles]
    pixels = hf.Idefics3ImageProcessorPil(
        max_image_size={"longest_edge": SIDE}, size={"longest_edge": 2 * SIDE}
    )
    template = _chat("<image>")
    return hf.Idefics3Processor(pixels, tokenizer(names), image_seq_len=4, chat_template=template)


def _gemma3():
    names = ("<image_soft_token>", "<video>", "<start_of_image>", "<end_of_image>")
    named = {"image_token": names[0], "boi_token": names[2], "eoi_token": names[3]}
    pixels = hf.Gemma3ImageProcessorPil(size=SQUARE)
    template = _chat("<start_of_image>")
    return hf.Gemma3Processor(
        pixels, tokenizer(names, **named), image_seq_length=4, chat_template=template
    )


def _paligemma():
    pixels = hf.SiglipImageProcessorPil(size=SQUARE)
    pixels.image_seq_length = 16
    return hf.PaliGemmaProcessor(pixels, tokenizer(["<image>"], bos=True, image_token="<image>"))


def _mllama():
    pixels = hf.MllamaImageProcessorPil(
        size={"height": 2 * PATCH, "width": 2 * PATCH}, max_image_tiles=2
    )
    return hf.MllamaProcessor(
        pixels, tokenizer(["<|image|>", "<|python_tag|>"]), chat_template=_chat("<|image|>")
    )


def _blip2():
    pixels = hf.BlipImageProcessorPil(size=SQUARE)
    return hf.Blip2Processor(pixels, tokenizer(["<image>"], bos=True), num_query_tokens=QUERIES)


def _instructblip():
    pixels = hf.BlipImageProcessorPil(size=SQUARE)
    words, questions = tokenizer(["<image>"], bos=True), tokenizer(["[Q]"], bos=True)
    return hf.InstructBlipProcessor(pixels, words, questions, num_query_tokens=QUERIES)


PROCESSORS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "qwen2_vl": lambda: _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": lambda: _qwen("Qwen3VLProcessor"),
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "paligemma2": _paligemma,
    "mllama": _mllama,
    "instructblip": _instructblip,
    "instructblip_opt": _instructblip,
    "blip2": _blip2,
}

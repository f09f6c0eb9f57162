"""Models that plans are compared with: tiny ones of three families, and published numbers."""

import torch

import fastalign as fa
from fastalign.planning import PlanConfig
from fastalign.testing.families import family, family_batch

FAMILIES = ("llava", "qwen2_5_vl", "internvl")
SAMPLE = "ttttitt" + 20 * "y"
ADAPTER = fa.AdapterConfig(shift_layers=(2, 3), shift_hidden_dim=48)
ONE_LAYER = fa.AdapterConfig(shift_layers=(1,))


def config_of(name):
    """The family's tiny configuration with five layers in its tower."""
    config = family(name).config
    if name == "qwen2_5_vl":
        config.vision_config.depth = 5
        config.vision_config.fullatt_block_indexes = [1, 4]
    else:
        config.vision_config.num_hidden_layers = 5
    return config


def build(config, attention="eager"):
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation=attention)


def batch_for(name, model, copies=2):
    one = family_batch(name, model, [SAMPLE])
    return {key: torch.cat([value] * copies) for key, value in one.items()}


def options_for(name, batch, **options):
    """The plan of such a batch."""
    length = batch["input_ids"].shape[1]
    image = int((batch["input_ids"][0] == 500).sum())
    return PlanConfig(
        **{
            "image_size": (56, 84) if name == "qwen2_5_vl" else None,
            "text_tokens": length - image,
            "label_tokens": int((batch["labels"][0] != -100).sum()),
            "prefix_tokens": 4 + (name != "llava"),
            "batch_size": len(batch["input_ids"]),
            "attention": "eager",
            "adapter": ADAPTER,
            "teacher": "dinov2-small",
            "dtype": "float32",
            **options,
        }
    )


def prepared(config, *, everything, adapter, attention="eager"):
    model = build(config, attention).train()
    model.requires_grad_(everything)
    if adapter:
        fa.attach(model, ADAPTER).requires_grad_(True)
    return model


def published(family, vision, text, **more):
    """A configuration of published numbers; no weights."""
    import transformers as hf

    vision_class, text_class, whole = {
        "llava": (hf.CLIPVisionConfig, hf.LlamaConfig, hf.LlavaConfig),
        "internvl": (hf.InternVLVisionConfig, hf.Qwen2Config, hf.InternVLConfig),
    }[family]
    parts = {"vision_config": vision_class(**vision), "text_config": text_class(**text)}
    return whole(**parts, **more)


# LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels and Vicuna-7B.
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP_L |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
VICUNA_7B = {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008}
VICUNA_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32}
# Qwen2.5-7B, the decoder of Qwen2.5-VL-7B and of InternVL3-8B.
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN_7B |= {"num_attention_heads": 28, "num_key_value_heads": 4}


def llava_7b():
    return published("llava", CLIP_L, VICUNA_7B)


def qwen_7b():
    import transformers as hf

    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    mrope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    return hf.Qwen2_5_VLConfig(
        vision_config={**vision, "out_hidden_size": 3584},
        text_config={**QWEN_7B, "vocab_size": 152064, "rope_parameters": mrope},
        tie_word_embeddings=False,
    )


def internvl_8b():
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "attention_bias": True, "image_size": [448, 448]}
    text = {**QWEN_7B, "vocab_size": 151674, "tie_word_embeddings": False}
    return published("internvl", vision, text, tie_word_embeddings=False)

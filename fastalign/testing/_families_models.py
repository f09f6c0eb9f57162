"""Tiny models of the transformers classes, one function a class; weights are drawn by the caller.

Every model has a decoder of 4 layers, width 64 and 4 heads (2 of keys), and images of 56 x 56
pixels or less in patches of 14. Images of a batch take turns between two sizes where the class can.
"""

from importlib import import_module
from typing import Any

VOCABULARY, SIDE, PATCH = 512, 56, 14
IMAGE, VIDEO, START, END = 500, 501, 502, 503
QUERIES = 4  # query tokens of a Q-Former

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
TILINGS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def llava() -> Any:
    hf = _transformers()
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )
    return hf.LlavaForConditionalGeneration(config)


def llava_next() -> Any:
    hf = _transformers()
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=TILINGS,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> Any:
    hf = _transformers()
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=TILINGS,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def internvl() -> Any:
    hf = _transformers()
    vision = hf.InternVLVisionConfig(
        **{**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    )
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config)


def two_towers() -> Any:
    """Mini-Gemini's form."""
    own = import_module("fastalign.testing._two_towers")
    return own.two_towers(VISION, TEXT, IMAGE)


def qwen2_vl() -> Any:
    hf = _transformers()
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": _mrope(2, 3, 3)}, vision_config=vision, **QWEN_IDS
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    hf = _transformers()
    vision = {**_qwen_vision(2), "fullatt_block_indexes": [1], "window_size": 56}
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": _mrope(2, 3, 3)}, vision_config=vision, **QWEN_IDS
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    hf = _transformers()
    vision = {
        **_qwen_vision(3),
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64,
        "patch_size": PATCH,
    }
    text = {**TEXT, "head_dim": 16, "rope_parameters": _mrope(4, 2, 2)}
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return hf.Qwen3VLForConditionalGeneration(config)


def qwen3_5() -> Any:
    hf = _transformers()
    vision = {**_qwen_vision(2), "num_position_embeddings": 64, "patch_size": PATCH}
    text = {
        **TEXT,
        "head_dim": 16,
        "rope_parameters": {**_mrope(4, 2, 2), "partial_rotary_factor": 1.0},
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    config = hf.Qwen3_5Config(text_config=text, vision_config=vision, **QWEN_IDS)
    return hf.Qwen3_5ForConditionalGeneration(config)


def idefics3() -> Any:
    return _idefics("Idefics3")


def smolvlm() -> Any:
    return _idefics("SmolVLM")


def mistral3() -> Any:
    hf = _transformers()
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**VISION),
        text_config=hf.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return hf.Mistral3ForConditionalGeneration(config)


def gemma3() -> Any:
    hf = _transformers()
    text = hf.Gemma3TextConfig(
        **TEXT,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def paligemma() -> Any:
    hf = _transformers()
    return _paligemma(hf.GemmaConfig(**TEXT, head_dim=16))


def paligemma2() -> Any:
    """Gemma 2 below: sliding layers, and logits capped at 30."""
    hf = _transformers()
    text = hf.Gemma2Config(
        **TEXT,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=30.0,
    )
    return _paligemma(text)


def mllama() -> Any:
    """The image token is the first id past the vocabulary, as in Llama 3.2."""
    hf = _transformers()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 64,
        "image_size": 2 * PATCH,
        "patch_size": PATCH,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = {
        **TEXT,
        "cross_attention_layers": [1, 3],
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY)
    return hf.MllamaForConditionalGeneration(config)


def blip2() -> Any:
    return _blip("Blip2", _opt())


def blip2_t5() -> Any:
    return _blip("Blip2", _t5())


def instructblip() -> Any:
    return _blip("InstructBlip", _transformers().LlamaConfig(**TEXT))


def instructblip_opt() -> Any:
    return _blip("InstructBlip", _opt())


def instructblip_t5() -> Any:
    return _blip("InstructBlip", _t5())


def lfm2_vl() -> Any:
    hf = _transformers()
    vision = {k: v for k, v in VISION.items() if k != "image_size"}
    text = {k: v for k, v in TEXT.items() if k != "tie_word_embeddings"}
    config = hf.Lfm2VlConfig(
        vision_config={**vision, "num_patches": (SIDE // PATCH) ** 2},
        text_config=hf.Lfm2Config(
            **text, full_attn_idxs=[1, 3], block_auto_adjust_ff_dim=False, tie_embedding=False
        ),
        image_token_id=IMAGE,
        projector_hidden_size=48,
        tie_word_embeddings=False,
    )
    return hf.Lfm2VlForConditionalGeneration(config)


def _transformers() -> Any:
    """Imported when a model is built; its configurations take keywords that their types omit."""
    return import_module("transformers")


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(section), "rope_theta": 10000.0}


def _qwen_vision(depth: int) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
    }


def _paligemma(text: Any) -> Any:
    hf = _transformers()
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=64),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
        tie_word_embeddings=False,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _opt() -> Any:
    hf = _transformers()
    return hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )


def _t5() -> Any:
    hf = _transformers()
    return hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=4,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )


def _idefics(kind: str) -> Any:
    hf = _transformers()
    config = getattr(hf, f"{kind}Config")(
        vision_config=VISION,
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _blip(kind: str, text: Any) -> Any:
    hf = _transformers()
    qformer = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": VISION["hidden_size"],
    }
    config = getattr(hf, f"{kind}Config")(
        vision_config=VISION,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)

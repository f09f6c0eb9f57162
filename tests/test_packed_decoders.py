"""Decoders of transformers with packed attention against the padded pass with explicit masks."""

import pytest
import torch
from _true64 import true_float64

pytest.importorskip("transformers")
import transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask

from fastalign.models import _packed
from fastalign.models._packed import NAME, Segments, packed, register

QUIET = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

# Kept tokens of five samples: gaps, none at all, one token, all, and a single late one.
KEEP = torch.tensor(
    [
        [1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
    ],
    dtype=torch.bool,
)
COMMON = {
    "vocab_size": 11,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
DECODERS = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 6}),
    "qwen2": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": SLIDING,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 6}),
    "mllama": ("MllamaText", {"cross_attention_layers": [1]}),  # skipped: there is no image
    # Softcapped scores, another scale than head_dim ** -0.5, two kinds of layers.
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 6,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 3,
            "layer_types": SLIDING,
        },
    ),
}


def decoder_of(name, **changes):
    family, options = DECODERS[name]
    config = getattr(transformers, f"{family}Config")(**(COMMON | options | changes))
    eager = name == "gemma2"  # its softcap is not in sdpa
    config._attn_implementation = "eager" if eager else "sdpa"
    model = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in model.parameters():
        # Scores of about 1 or more, so that a wrong mask shows.
        parameter.data.normal_(0, 0.5) if parameter.dim() > 1 else None
    return model.double()


def full_length(model, embeds, keep, window):
    """The padded pass with every dropped token masked as a key, by explicit 4-D masks."""
    b, length = keep.shape
    ahead = torch.arange(length)[:, None] - torch.arange(length)
    seen = keep[:, None] & (ahead >= 0)
    # A row whose keys are all hidden sees itself: no NaN, and nobody reads it.
    seen |= torch.eye(length, dtype=torch.bool)

    def additive(mask):
        zero = torch.zeros(b, 1, length, length, dtype=embeds.dtype)
        return zero.masked_fill(~mask[:, None], torch.finfo(embeds.dtype).min)

    full = additive(seen)
    sliding = full if window is None else additive(seen & (ahead < window))
    masks = {"full_attention": full, "sliding_attention": sliding}
    types = getattr(model.config, "layer_types", None)
    return model(
        inputs_embeds=embeds,
        attention_mask=masks if types is not None and window is not None else sliding,
        position_ids=torch.arange(length)[None].expand(b, -1),
        use_cache=False,
    ).last_hidden_state


def packed_pass(model, embeds, segments, backend="auto"):
    with torch.no_grad(), packed(model, segments, backend):
        return model(
            inputs_embeds=embeds[segments.rows, segments.positions][None],
            position_ids=segments.positions[None],
            use_cache=False,
        ).last_hidden_state[0]


@QUIET
@pytest.mark.parametrize("backend", ["auto", "flex"])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_decoder_is_the_masked_decoder(name, backend):
    model = decoder_of(name)
    window = DECODERS[name][1].get("sliding_window")
    embeds = torch.randn(*KEEP.shape, 24, dtype=torch.float64)
    segments = Segments.from_mask(KEEP)
    with torch.no_grad(), true_float64():
        expected = full_length(model, embeds, KEEP, window)[segments.rows, segments.positions]
        out = packed_pass(model, embeds, segments, backend)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert not torch.equal(expected, expected.float().double())  # nothing was rounded to float32


def test_packing_detection_would_be_wrong():
    # What the explicit segments are for: transformers takes each gap for the border of a sample.
    model = decoder_of("llama")
    embeds = torch.randn(*KEEP.shape, 24, dtype=torch.float64)
    segments = Segments.from_mask(KEEP)
    out = packed_pass(model, embeds, segments)
    with torch.no_grad():
        detected = model(
            inputs_embeds=embeds[segments.rows, segments.positions][None],
            position_ids=segments.positions[None],
            use_cache=False,
        ).last_hidden_state[0]
    same = torch.isclose(out, detected, atol=1e-5).all(-1)
    assert same[:2].all() and not same[2:6].any()  # the first sample has its gap after two tokens


def test_in_bfloat16_and_under_autocast():
    segments = Segments.from_mask(KEEP)
    embeds = torch.randn(*KEEP.shape, 24)
    model = decoder_of("qwen3").float()
    expected = packed_pass(model, embeds, segments)
    with torch.autocast("cpu", torch.bfloat16):
        inside = packed_pass(model, embeds, segments)
    halved = packed_pass(model.bfloat16(), embeds.bfloat16(), segments)
    for out in (inside, halved):
        assert (out.float() - expected).norm() < 0.05 * expected.norm()


def implementations(model):
    """The attention implementation of every configuration that a module holds, by module name."""
    return {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }


def gemma3(**changes):
    """A vision-language model whose parts have configurations of their own."""
    text = COMMON | {"head_dim": 6, "sliding_window": 4, "layer_types": SLIDING}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **changes)
    config.text_config._attn_implementation = "eager"
    config.vision_config._attn_implementation = "sdpa"
    return transformers.Gemma3Model(config).eval()


def test_everything_is_restored():
    model = gemma3()
    decoder = model.language_model
    before, segments = implementations(model), Segments.from_mask(KEEP)
    assert {"eager", "sdpa"} <= set(before.values())
    with packed(decoder, segments):
        assert set(implementations(decoder).values()) == {NAME}
        # The vision tower is no part of the decoder.
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert implementations(model) == before
    assert not decoder._forward_hooks and _packed._RUNNING.get() is None
    with pytest.raises(KeyError, match="stop"), packed(decoder, segments):
        raise KeyError("stop")
    assert implementations(model) == before
    assert not decoder._forward_hooks and _packed._RUNNING.get() is None
    decoder.config._attn_implementation = None  # as some configurations have it
    with packed(decoder, segments):
        pass
    assert decoder.config._attn_implementation is None


def test_contexts_nest():
    model = decoder_of("llama")
    outer, inner = Segments.from_mask(KEEP), Segments.from_mask(KEEP[3:])
    embeds = torch.randn(*KEEP.shape, 24, dtype=torch.float64)
    expected = packed_pass(model, embeds, outer)
    with packed(model, outer):
        alone = packed_pass(model, embeds[3:], inner)
        after = model(
            inputs_embeds=embeds[outer.rows, outer.positions][None],
            position_ids=outer.positions[None],
            use_cache=False,
        ).last_hidden_state[0]
    assert torch.equal(after, expected)
    assert torch.equal(alone, packed_pass(model, embeds[3:], inner))
    assert set(implementations(model).values()) == {"sdpa"}


def test_registered_once_and_makes_no_mask():
    assert register() == NAME == register()
    assert AttentionInterface._global_mapping[NAME] is _packed._attend
    mask = AttentionMaskInterface._global_mapping[NAME]
    config = transformers.LlamaConfig(**COMMON)
    config._attn_implementation = NAME
    made = {"config": config, "inputs_embeds": torch.zeros(1, 4, 24), "past_key_values": None}
    gaps = torch.tensor([[0, 1, 7, 8]])
    assert create_causal_mask(**made, attention_mask=None, position_ids=gaps) is None
    assert mask(batch_size=1, q_length=4, kv_length=4) is None
    with pytest.raises(ValueError, match="takes no attention_mask, .* leave it out"):
        create_causal_mask(**made, attention_mask=torch.ones(1, 4), position_ids=gaps)
    overlay = {"or_mask_function": lambda *args: torch.tensor(True)}
    with pytest.raises(ValueError, match="takes no mask function of its own"):
        create_causal_mask(**made, attention_mask=None, position_ids=gaps, **overlay)


def test_named_back_end_reaches_the_decoder():
    model, segments = decoder_of("llama"), Segments.from_mask(KEEP)
    embeds = torch.randn(*KEEP.shape, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="backend 'varlen' cannot run .* not on cpu"):
        packed_pass(model, embeds, segments, "varlen")
    assert set(implementations(model).values()) == {"sdpa"}
    with (
        pytest.raises(ValueError, match="backend must be one of"),
        packed(model, segments, "flash"),
    ):
        pass


def test_decoders_that_cannot_be_packed():
    segments = Segments.from_mask(KEEP)
    with pytest.raises(TypeError, match="Linear holds no configuration"), packed(
        torch.nn.Linear(2, 2), segments
    ):  # fmt: skip
        pass
    config = transformers.Lfm2Config(
        **COMMON, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3
    )
    recurrent = transformers.Lfm2Model(config)
    refusal = "Lfm2Model cannot run packed: conv, Conv1d would carry"
    with pytest.raises(ValueError, match=refusal), packed(recurrent, segments):
        pass
    assert NAME not in implementations(recurrent).values()


def test_cross_attention_is_refused():
    model, segments = decoder_of("mllama"), Segments.from_mask(KEEP)
    row = torch.randn(1, 20, 24, dtype=torch.float64)
    refusal = "MllamaTextCrossAttention cannot run packed, as it asks for cross-attention"
    with packed(model, segments), pytest.raises(ValueError, match=refusal):
        model(
            inputs_embeds=row,
            position_ids=segments.positions[None],
            cross_attention_states=row[:, :7],
            use_cache=False,
        )


def attend(segments, length=20, module=None, **options):
    """One call of the function that transformers' modules call."""
    q = torch.randn(1, 2, 20, 8)
    k = v = torch.randn(1, 2, length, 8)
    module = torch.nn.Identity() if module is None else module
    token = _packed._RUNNING.set(_packed._Run(segments, "auto"))
    try:
        return _packed._attend(module, q, k, v, options.pop("attention_mask", None), **options)
    finally:
        _packed._RUNNING.reset(token)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attention_mask": torch.zeros(1, 1, 20, 20)}, "an attention_mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "attention that is not causal"),
        ({"length": 7}, "cross-attention or a cache"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 2, 20, 20)}, "position_bias"),
    ],
)
def test_what_an_attention_module_may_not_ask_for(options, why):
    segments = Segments.from_mask(KEEP)
    with pytest.raises(ValueError, match=f"Identity cannot run packed, as it asks for {why}; "):
        attend(segments, **options)
    bidirectional = torch.nn.Identity()
    bidirectional.is_causal = False
    with pytest.raises(ValueError, match="not causal"):
        attend(segments, module=bidirectional)
    out, weights = attend(segments, position_ids=torch.zeros(1, 20), s_aux=None)
    assert out.shape == (1, 20, 2, 8) and weights is None


def test_outside_of_the_context():
    with pytest.raises(RuntimeError, match="packed attention outside of `packed`"):
        _packed._attend(torch.nn.Identity(), *(torch.zeros(1, 1, 1, 1) for _ in range(3)))


def test_gpt_oss_sinks_are_refused():
    config = transformers.GptOssConfig(
        **COMMON, head_dim=6, num_local_experts=2, num_experts_per_tok=1, sliding_window=4
    )
    model = transformers.GptOssModel(config).eval()
    segments = Segments.from_mask(KEEP)
    with pytest.raises(ValueError, match="GptOssAttention cannot run packed, .* s_aux"):
        packed_pass(model, torch.randn(*KEEP.shape, 24), segments)


def test_a_decoder_that_ignores_the_swap():
    class Deaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.LlamaConfig(**COMMON)

        def forward(self, inputs_embeds):
            return inputs_embeds

    model, segments = Deaf(), Segments.from_mask(KEEP)
    with packed(model, segments), pytest.raises(RuntimeError, match="Deaf ran without packed"):
        model(torch.zeros(1, 20, 24))
    assert model(torch.zeros(1, 20, 24)).shape == (1, 20, 24)  # and freely outside


def test_a_window_that_stays_in_the_mask():
    # Qwen2 with its window taken from the attention modules: only the mask knows of it.
    model = decoder_of("qwen2")
    for layer in model.layers:
        layer.self_attn.sliding_window = None
    segments = Segments.from_mask(KEEP)
    embeds = torch.randn(*KEEP.shape, 24, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"a sliding window of \[4\] into its mask"):
        packed_pass(model, embeds, segments)

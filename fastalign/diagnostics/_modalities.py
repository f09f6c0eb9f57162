"""Whether a model has image tokens for MIR to compare with those of text."""

from fastalign.models import VLM


def check_image_tokens(vlm: VLM) -> None:
    """Refuse a model in which images are no rows of the decoder's hidden states.

    Raises:
        ValueError: Images enter by cross-attention (Mllama).
    """
    if getattr(vlm.config.get_text_config(), "cross_attention_layers", None):
        raise ValueError(
            f"model must hold images as tokens among the text: {type(vlm.model).__name__} reads "
            "them by cross-attention, so its layers have no image rows for MIR to compare (the "
            "token that marks an image is embedded as text)"
        )

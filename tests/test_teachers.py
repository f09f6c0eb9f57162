"""Teachers from transformers: right pixels in, patches alone out, no gradient."""

import pytest
import torch

from fastalign.teachers import IMAGENET, PatchTeacher

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def dinov2(registers=0):
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    if registers:
        return Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(num_register_tokens=registers, **sizes)
        ).eval()
    return Dinov2Model(Dinov2Config(**sizes)).eval()


def normalised(images, statistics):
    mean, std = (torch.tensor(s)[:, None, None] for s in statistics)
    return (images - mean) / std


@pytest.mark.parametrize("registers", [0, 4])
def test_features_are_the_teachers_own(registers):
    """An image of the teacher's size reaches it unchanged but for the normalisation."""
    model = dinov2(registers)
    images = torch.rand(3, 3, 28, 28)
    teacher = PatchTeacher(model, student=CLIP)
    features = teacher({"pixel_values": normalised(images, CLIP)})
    with torch.no_grad():
        hidden = model(pixel_values=normalised(images, IMAGENET)).last_hidden_state
    assert features.shape == (3, 4, 16) and hidden.shape[1] == 4 + 1 + registers
    torch.testing.assert_close(features, hidden[:, 1 + registers :], atol=1e-5, rtol=1e-4)


def test_images_take_the_teachers_size():
    teacher = PatchTeacher(dinov2(), student=CLIP, image_size=56)
    features = teacher({"pixel_values": torch.randn(2, 3, 16, 16)})
    assert features.shape == (2, 16, 16)


def test_a_teacher_stays_frozen():
    teacher = PatchTeacher(dinov2(), student=CLIP).train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    pixels = torch.randn(1, 3, 28, 28, requires_grad=True)
    assert not teacher({"pixel_values": pixels}).requires_grad
    assert all(name.startswith("model.") for name in teacher.state_dict())


def test_from_a_folder(tmp_path):
    from transformers import CLIPImageProcessorPil

    model = dinov2()
    model.save_pretrained(tmp_path / "teacher")
    CLIPImageProcessorPil(image_mean=CLIP[0], image_std=CLIP[1]).save_pretrained(tmp_path / "vlm")
    teacher = PatchTeacher.from_pretrained(str(tmp_path / "teacher"), str(tmp_path / "vlm"))
    batch = {"pixel_values": torch.randn(2, 3, 28, 28)}
    assert torch.equal(teacher(batch), PatchTeacher(model, student=CLIP)(batch))


def test_a_size_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="multiple of the teacher's patch size 14: got 30"):
        PatchTeacher(dinov2(), student=CLIP, image_size=30)

"""Teachers from transformers: right pixels in, patches alone out, no gradient."""

import json

import _processors
import pytest
import torch
import transformers as hf

import fastalign as fa
from fastalign import checkpoint
from fastalign.teachers import IMAGENET, PatchTeacher
from fastalign.testing.families import family, family_batch, samples_for
from fastalign.testing.models import tiny_llava

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
# Kind of teacher: patch size, tokens before the patches.
KINDS = {
    "dinov2": (14, 1), "registers": (14, 5), "dinov3": (16, 4), "convnext": (32, 1),
}  # fmt: skip


def dinov2(**changes):
    torch.manual_seed(0)
    return hf.Dinov2Model(hf.Dinov2Config(**(SIZES | {"patch_size": 14} | changes))).eval()


def resnet(kind=hf.ResNetModel, **changes):
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    return kind(hf.ResNetConfig(**sizes, **changes)).eval()


def make(kind):
    torch.manual_seed(0)
    if kind == "dinov2":
        return dinov2()
    if kind == "registers":
        config = hf.Dinov2WithRegistersConfig(num_register_tokens=4, patch_size=14, **SIZES)
        return hf.Dinov2WithRegistersModel(config).eval()
    if kind == "dinov3":
        sizes = SIZES | {"image_size": 32, "intermediate_size": 32}
        return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(num_register_tokens=3, **sizes)).eval()
    config = hf.DINOv3ConvNextConfig(
        hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1], image_size=64
    )
    return hf.DINOv3ConvNextModel(config).eval()


def normalised(images, statistics):
    mean, std = (torch.tensor(s)[:, None, None] for s in statistics)
    return (images - mean) / std


def counted(teacher):
    """The number of images of each call of the teacher's model."""
    sizes = []
    teacher.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return sizes


# -- which features -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (1, 4), (3, 2)])
def test_features_are_the_teachers_own(kind, grid):
    """A view that has the teacher's size reaches it unchanged but for the normalisation.

    At other sizes than its own DINOv2 interpolates its positions, and DINOv3 turns others.
    """
    model, (patch, prefix) = make(kind), KINDS[kind]
    h, w = grid
    images = torch.rand(3, 3, h * patch, w * patch)
    side = {(2, 2): 2, (3, 3): 3, (1, 4): 2, (3, 2): 2}[grid]
    teacher = PatchTeacher(model, student=CLIP, image_size=side * patch)
    features = teacher({"pixel_values": normalised(images, CLIP)})
    with torch.no_grad():
        hidden = model(pixel_values=normalised(images, IMAGENET)).last_hidden_state
    assert features.shape == (3, h, w, 16) and hidden.shape[1] == prefix + h * w
    expected = hidden[:, prefix:].unflatten(1, grid)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [hf.ResNetModel, hf.ResNetBackbone])
def test_a_feature_map_is_taken_as_it_is(kind):
    # Stem 4, then stages of stride 1 and 2: one feature for 8 x 8 pixels.
    options = {"out_features": ["stage1", "stage2"]} if kind is hf.ResNetBackbone else {}
    model = resnet(kind, **options)
    teacher = PatchTeacher(model, student=CLIP, image_size=32)
    images = torch.rand(2, 3, 16, 64)
    features = teacher({"pixel_values": normalised(images, CLIP)})
    with torch.no_grad():
        out = model(pixel_values=normalised(images, IMAGENET))
    hidden = out.last_hidden_state if kind is hf.ResNetModel else out.feature_maps[-1]
    assert teacher.patch_size == 8 and features.shape == (2, 2, 8, 8)
    torch.testing.assert_close(features, hidden.movedim(1, 3), atol=1e-5, rtol=1e-4)


def test_a_backbone_of_dinov2_gives_its_map():
    config = hf.Dinov2Config(patch_size=14, **SIZES)
    teacher = PatchTeacher(hf.Dinov2Backbone(config), student=CLIP)
    assert teacher({"pixel_values": torch.randn(1, 3, 28, 28)}).shape == (1, 2, 2, 16)


# -- sizes --------------------------------------------------------------------------------------


def test_square_images_take_the_teachers_size():
    teacher = PatchTeacher(dinov2(), student=CLIP, image_size=56)
    features = teacher({"pixel_values": torch.randn(2, 3, 16, 16)})
    assert features.shape == (2, 4, 4, 16)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((30, 30), (16, 16)),
        # 16 / sqrt 2 = 11.3 by 16 sqrt 2 = 22.6: of 11 or 12 by 22 or 23, 11 : 22 is 1 : 2.
        ((20, 40), (11, 22)),
        ((40, 20), (22, 11)),
        ((10, 40), (8, 32)),
        # 13.86 by 18.48: 13 : 18 is off by 1.0385, 13 : 19 by 1.096, 14 : 19 by 1.018 and 14 : 18
        # by 1.037 from 3 : 4.
        ((30, 40), (14, 19)),
        # 0.98 by 262: there is no grid of 0 rows.
        ((1, 268), (1, 262)),
    ],
)
def test_other_views_keep_their_aspect_ratio(size, grid):
    teacher = PatchTeacher(dinov2(num_hidden_layers=1), student=CLIP, image_size=224)
    (features,) = teacher.features([torch.randn(3, *size)])
    assert features.shape == (*grid, 16)


def test_views_of_several_sizes_keep_their_order():
    teacher = PatchTeacher(dinov2(), student=CLIP, views=lambda batch: batch["views"])
    views = [torch.randn(3, *size) for size in ((20, 20), (10, 41), (33, 33), (20, 20), (41, 10))]
    sizes = counted(teacher)
    features = teacher({"pixel_values": views[0], "views": views})
    assert sizes == [3, 1, 1]  # the three squares together
    assert [tuple(f.shape) for f in features] == [
        *((2, 2, 16), (1, 4, 16), (2, 2, 16), (2, 2, 16), (4, 1, 16))
    ]
    for view, found in zip(views, features, strict=True):
        torch.testing.assert_close(found, teacher.features([view])[0])


def test_few_images_go_through_at_once():
    teacher = PatchTeacher(dinov2(), student=CLIP, batch_size=2)
    images = torch.randn(5, 3, 28, 28)
    sizes = counted(teacher)
    features = teacher({"pixel_values": images})
    assert sizes == [2, 2, 1]
    whole = PatchTeacher(dinov2(), student=CLIP)({"pixel_values": images})
    torch.testing.assert_close(features, whole)


def test_no_image_gives_no_features():
    teacher = PatchTeacher(dinov2(), student=CLIP, views=lambda batch: 1 / 0)
    sizes = counted(teacher)
    assert teacher({"input_ids": torch.ones(2, 3)}).shape == (0, 2, 2, 16)
    assert teacher.features([]).dtype == torch.float32 and not sizes


# -- numbers ------------------------------------------------------------------------------------


def test_a_teacher_in_bfloat16_gives_bfloat16_and_keeps_its_statistics():
    images = torch.rand(2, 3, 28, 28)
    teacher = PatchTeacher(dinov2(), student=CLIP).to(torch.bfloat16)
    features = teacher({"pixel_values": normalised(images, CLIP)})
    seen = []
    teacher.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    teacher({"pixel_values": normalised(images, CLIP)})
    assert features.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16 below 4: statistics rounded to it would add more.
    assert (seen[0].float() - normalised(images, IMAGENET)).abs().max() < 2**-7 * 1.01


def test_pixels_in_bfloat16_are_taken():
    teacher = PatchTeacher(dinov2(), student=CLIP)
    features = teacher({"pixel_values": torch.randn(1, 3, 28, 28).bfloat16()})
    assert features.dtype == torch.float32


def test_a_teacher_stays_frozen():
    teacher = PatchTeacher(dinov2(hidden_dropout_prob=0.5), student=CLIP).train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    pixels = torch.randn(1, 3, 28, 28, requires_grad=True)
    assert not teacher({"pixel_values": pixels}).requires_grad
    assert all(name.startswith("model.") for name in teacher.state_dict())


def test_a_checkpoint_holds_no_teacher():
    vlm = fa.VLM(tiny_llava())
    teacher = PatchTeacher(dinov2(), student=CLIP, views=vlm.views)
    with_teacher = fa.objectives.DeepAlignState(vlm, teacher=teacher)
    without = fa.objectives.DeepAlignState(vlm)
    stored = [checkpoint.trained_tensors(vlm.model, s).keys() for s in (with_teacher, without)]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "qwen2_vl", "blip2"])
def test_views_of_a_model_reach_its_teacher(name):
    """Tiles, stitched pictures and grids of any shape: features of each, in the order of views."""
    vlm = fa.VLM(family(name))
    batch = family_batch(name, vlm.model, samples_for(name))
    views = vlm.views(batch)
    teacher = PatchTeacher(dinov2(), student=CLIP, image_size=56, views=vlm.views)
    features = teacher(batch)
    assert len(features) == len(views) > 0
    for view, found in zip(views, features, strict=True):
        torch.testing.assert_close(found, teacher.features([view])[0])
        assert (found.shape[0] > found.shape[1]) <= (view.shape[1] > view.shape[2])


# -- from folders -------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """A teacher and a student's processor."""
    dinov2().save_pretrained(tmp_path / "teacher")
    student = hf.CLIPImageProcessorPil(image_mean=CLIP[0], image_std=CLIP[1])
    student.save_pretrained(tmp_path / "vlm")
    return str(tmp_path / "teacher"), str(tmp_path / "vlm")


def test_from_a_folder(folders):
    teacher = PatchTeacher.from_pretrained(*folders, views=lambda batch: list(batch["images"]))
    batch = {"images": torch.randn(2, 3, 28, 28), "pixel_values": 0}
    expected = PatchTeacher(dinov2(), student=CLIP)({"pixel_values": batch["images"]})
    assert torch.equal(teacher(batch), expected)
    larger = PatchTeacher.from_pretrained(*folders, image_size=42, batch_size=1)
    assert (larger.image_size, larger.batch_size) == (42, 1)


def test_a_head_is_left_out_and_a_missing_weight_is_not(tmp_path, folders):
    from safetensors.torch import load_file, save_file

    whole = hf.Dinov2ForImageClassification(hf.Dinov2Config(patch_size=14, **SIZES))
    whole.save_pretrained(tmp_path / "classifier")
    teacher = PatchTeacher.from_pretrained(str(tmp_path / "classifier"), folders[1])
    own = whole.dinov2.embeddings.position_embeddings
    assert torch.equal(teacher.model.embeddings.position_embeddings, own)
    path = tmp_path / "classifier/model.safetensors"
    weights = load_file(path)
    del weights["dinov2.embeddings.mask_token"], weights["classifier.weight"]
    save_file(weights, path, {"format": "pt"})
    PatchTeacher.from_pretrained(str(tmp_path / "classifier"), folders[1])
    del weights["dinov2.layernorm.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"all weights of Dinov2Model: missing \['layernorm.we"):
        PatchTeacher.from_pretrained(str(tmp_path / "classifier"), folders[1])


def test_the_teachers_own_statistics_are_read(folders):
    half = [0.5] * 3
    hf.BitImageProcessorPil(image_mean=half, image_std=half).save_pretrained(folders[0])
    teacher = PatchTeacher.from_pretrained(*folders)
    expected = PatchTeacher(dinov2(), student=CLIP, teacher=(half, half))
    batch = {"pixel_values": torch.randn(1, 3, 28, 28)}
    assert torch.equal(teacher(batch), expected(batch))


def test_statistics_are_read_where_the_class_cannot_be_made(folders):
    """DINOv3's processor exists for torchvision only."""
    settings = {"image_processor_type": "DINOv3ViTImageProcessor", "do_normalize": True}
    settings |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    path = folders[0] + "/preprocessor_config.json"
    with open(path, "w") as file:
        json.dump(settings, file)
    teacher = PatchTeacher.from_pretrained(*folders)
    assert teacher.statistics["teacher"] == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.mark.parametrize(
    "name", ["LlavaNext", "GotOcr2", "Qwen2VL", "Idefics3", "Gemma3", "Siglip", "Blip", "Mllama"]
)
def test_every_familys_image_processor_is_read(folders, tmp_path, name):
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    made = getattr(hf, f"{name}ImageProcessorPil")(image_mean=mean, image_std=std)
    made.save_pretrained(tmp_path / "other")
    teacher = PatchTeacher.from_pretrained(folders[0], str(tmp_path / "other"))
    assert teacher.statistics["student"] == (tuple(mean), tuple(std))


def test_a_wrapped_image_processor_is_read(folders, tmp_path):
    processor = _processors._llava_next()
    processor.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole/preprocessor_config.json").exists()  # it lies inside another file
    teacher = PatchTeacher.from_pretrained(folders[0], str(tmp_path / "whole"))
    assert teacher.statistics["student"][0] == tuple(processor.image_processor.image_mean)


@pytest.mark.parametrize(
    ("options", "statistics"),
    [
        ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3)),
        # Pixels stay in 0..255: x = 255 p - 102 by 51, which is (p - 0.4) / 0.2.
        (
            {"do_rescale": False, "image_mean": [102.0] * 3, "image_std": [51.0] * 3},
            ((0.4,) * 3, (0.2,) * 3),
        ),
        # 255 p / 510 - 0.25 by 0.5 = (p - 0.5) / 1.
        (
            {"rescale_factor": 1 / 510, "image_mean": [0.25] * 3, "image_std": [0.5] * 3},
            ((0.5,) * 3, (1.0,) * 3),
        ),
    ],
)
def test_what_a_processor_leaves_out_is_not_undone(folders, tmp_path, options, statistics):
    hf.CLIPImageProcessorPil(**options).save_pretrained(tmp_path / "other")
    teacher = PatchTeacher.from_pretrained(folders[0], str(tmp_path / "other"))
    for found, expected in zip(teacher.statistics["student"], statistics, strict=True):
        assert found == pytest.approx(expected)


def test_an_offset_of_rescaling_is_undone(folders, tmp_path):
    # EfficientNet's: 255 p / 127.5 - 1 = (p - 0.5) / 0.5.
    made = hf.EfficientNetImageProcessorPil(
        rescale_offset=True, rescale_factor=1 / 127.5, do_normalize=False
    )
    made.save_pretrained(tmp_path / "other")
    teacher = PatchTeacher.from_pretrained(folders[0], str(tmp_path / "other"))
    for found in teacher.statistics["student"]:
        assert found == pytest.approx((0.5,) * 3)


# -- errors -------------------------------------------------------------------------------------


def test_a_folder_that_is_missing_is_named(folders, tmp_path):
    empty = tmp_path / "empty"
    with pytest.raises(FileNotFoundError, match=r"path must be a folder with a config.json: .* is"):
        PatchTeacher.from_pretrained(str(empty), folders[1])
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"path must be .* has none"):
        PatchTeacher.from_pretrained(str(empty), folders[1])
    with pytest.raises(FileNotFoundError, match=r"student_path must be a folder with a prepro"):
        PatchTeacher.from_pretrained(folders[0], str(empty))
    with pytest.raises(FileNotFoundError, match="student_path must be .*''"):
        PatchTeacher.from_pretrained(folders[0], "")


def test_an_unknown_type_of_model_is_named(folders, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text('{"model_type": "dinov9"}')
    with pytest.raises(ValueError, match="type that transformers .* knows: .*new: .*dinov9"):
        PatchTeacher.from_pretrained(str(tmp_path / "new"), folders[1])


def test_statistics_that_are_missing_are_named(folders, tmp_path):
    settings = {"image_processor_type": "DINOv3ViTImageProcessor", "image_mean": [0.5]}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"student_path: .*odd.* must have image_mean and image_"):
        PatchTeacher.from_pretrained(folders[0], str(tmp_path / "odd"))
    with pytest.raises(ValueError, match="teacher must be a mean and a standard deviation other"):
        PatchTeacher(dinov2(), student=CLIP, teacher=(CLIP[0], (1, 1, 0)))


def test_a_size_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="multiple of the teacher's patch size 14: got 30"):
        PatchTeacher(dinov2(), student=CLIP, image_size=30)
    with pytest.raises(ValueError, match="image_size must be a positive number of pixels: got 0"):
        PatchTeacher(dinov2(), student=CLIP, image_size=0)
    with pytest.raises(ValueError, match="got None, and the configuration of ResNetModel says No"):
        PatchTeacher(resnet(), student=CLIP)
    with pytest.raises(ValueError, match="grid: ResNetModel gives 4 rows for 30 pixels"):
        PatchTeacher(resnet(), student=CLIP, image_size=30)
    with pytest.raises(ValueError, match="batch_size must be at least 1: got 0"):
        PatchTeacher(dinov2(), student=CLIP, batch_size=0)


def test_a_model_that_is_no_teacher_is_refused():
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"must be Dinov2Model, .*: got CLIPVisionModel, whose"):
        PatchTeacher(hf.CLIPVisionModel(vision), student=CLIP)
    with pytest.raises(TypeError, match="model must be Dinov2Model, .*: got LlavaForCondit"):
        PatchTeacher(tiny_llava(), student=CLIP)
    with pytest.raises(TypeError, match="got Linear"):
        PatchTeacher(torch.nn.Linear(3, 3), student=CLIP)


def test_pixels_that_are_no_views_are_refused():
    teacher = PatchTeacher(dinov2(), student=CLIP)
    with pytest.raises(ValueError, match=r"\(images, 3, H, W\): got \(2, 1, 3, 28, 28\).*\.views"):
        teacher({"pixel_values": torch.randn(2, 1, 3, 28, 28)})
    with pytest.raises(ValueError, match=r"views must be .*: got \(1, 28, 28\) torch.float32"):
        teacher.features([torch.randn(1, 28, 28)])
    with pytest.raises(ValueError, match=r"got \(3, 28, 28\) torch.uint8"):
        teacher.features([torch.zeros(3, 28, 28, dtype=torch.uint8)])

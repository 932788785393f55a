"""Small random models of libraries that the project does not depend on, and torch's recurrent layers.

    pip install --target site_libs --no-deps diffusers ultralytics ...   # never over torch
    PYTHONPATH=site_libs python benchmarks/zoo.py --suite libraries --peer no

Models of a library that is not installed are skipped, which is said. Nothing is downloaded.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Case, Draw, image_draw, tensor_draw


SMOKE = "torch/gru"
Made = tuple[nn.Module, Draw]
TOKENS, VOCABULARY, CLASSES = 8, 50, 10


def _from(module: str, name: str, *args: Any, **options: Any) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module(module), name)(*args, **options)
    return model


def _image(module: str, name: str, *args: Any, size: int = 64, **options: Any) -> Made:
    """A class that reads one image."""
    return _from(module, name, *args, **options), image_draw(size)


def _together(*draws: Draw) -> Draw:
    """Several arguments."""
    return lambda generator, batch: tuple(draw(generator, batch) for draw in draws)


def _whole(high: int, *shape: int) -> Draw:
    """Whole numbers in [0, high)."""
    return lambda generator, batch: torch.randint(0, high, (batch, *shape), generator=generator)


# --- recurrent layers ------------------------------------------------------------------------


class Tagger(nn.Module):
    """Embeds tokens, reads them one after the other, and scores each."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.rnn = kind(24, 32, batch_first=True, **options)  # type: ignore[call-arg]  # torch's bases differ
        width = options.get("proj_size", 0) or 32
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of every token."""
        return self.head(self.rnn(self.embed(tokens))[0])


class Stepping(nn.Module):
    """A cell that is called for every step."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.into, self.cell = nn.Linear(12, 24), cell(24, 32)  # type: ignore[call-arg]
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores after the last step."""
        state: Any = None
        for step in range(x.shape[1]):
            state = self.cell(self.into(x[:, step]), state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def _tagger(kind: type[nn.RNNBase], **options: Any) -> Made:
    return Tagger(kind, **options), _whole(VOCABULARY, TOKENS)


def _stepping(cell: type[nn.RNNCellBase]) -> Made:
    return Stepping(cell), tensor_draw(5, 12)


TORCH = {
    "rnn": partial(_tagger, nn.RNN),
    "gru": partial(_tagger, nn.GRU),
    "lstm": partial(_tagger, nn.LSTM),
    "gru_stacked": partial(_tagger, nn.GRU, num_layers=2),
    "lstm_bidirectional": partial(_tagger, nn.LSTM, num_layers=2, bidirectional=True),
    "lstm_projected": partial(_tagger, nn.LSTM, proj_size=16),
    "gru_cell": partial(_stepping, nn.GRUCell),
    "lstm_cell": partial(_stepping, nn.LSTMCell),
}

# --- diffusers -------------------------------------------------------------------------------

BLOCKS = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "sample_size": 16,
    "layers_per_block": 1,
}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 16}
STEP = _whole(1000)


def _diffusers(name: str, *draws: Draw, **options: Any) -> Made:
    draw = _together(*draws) if len(draws) > 1 else draws[0]
    return _from("diffusers", name, **options), draw


def _text_to_image(name: str, **options: Any) -> Made:
    """Latents, a text and a step, by name."""
    latents, text, pooled = tensor_draw(4, 16, 16), tensor_draw(TOKENS, 32), tensor_draw(32)

    def draw(generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        given = {
            "hidden_states": latents(generator, batch),
            "encoder_hidden_states": text(generator, batch),
            "timestep": STEP(generator, batch),
        }
        return given | ({"pooled_projections": pooled(generator, batch)} if "SD3" in name else {})

    return _from("diffusers", name, **options), draw


DIFFUSERS = {
    "unet2d": partial(
        _diffusers,
        "UNet2DModel",
        image_draw(16),
        STEP,
        **BLOCKS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "unet2d_condition": partial(
        _diffusers,
        "UNet2DConditionModel",
        image_draw(16, channels=4),
        STEP,
        tensor_draw(TOKENS, 32),
        **BLOCKS,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "dit": partial(
        _diffusers,
        "DiTTransformer2DModel",
        image_draw(16, channels=4),
        STEP,
        _whole(CLASSES),
        **HEADS,
        in_channels=4,
        num_embeds_ada_norm=1000,
    ),
    "sd3": partial(
        _text_to_image,
        "SD3Transformer2DModel",
        **HEADS,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
    ),
    "pixart": partial(
        _text_to_image,
        "PixArtTransformer2DModel",
        **HEADS,
        in_channels=4,
        caption_channels=32,
        cross_attention_dim=32,
    ),
    "autoencoder_kl": partial(
        _diffusers,
        "AutoencoderKL",
        image_draw(16),
        **BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "vq_model": partial(
        _diffusers,
        "VQModel",
        image_draw(16),
        **BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
}

# --- detectors and segmenters ----------------------------------------------------------------


def _yolo(name: str, task: str = "Detection") -> Made:
    return _image("ultralytics.nn.tasks", f"{task}Model", f"{name}.yaml", ch=3, verbose=False)


ULTRALYTICS = {
    name: partial(_yolo, name)
    for name in ("yolov5n", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n")
} | {
    name: partial(_yolo, name, task)
    for name, task in {
        "yolov8n-seg": "Segmentation",
        "yolo11n-seg": "Segmentation",
        "yolov8n-pose": "Pose",
        "yolo11n-pose": "Pose",
        "yolov8n-cls": "Classification",
        "yolo11n-obb": "OBB",
    }.items()
}

SMP = {
    f"{name.lower()}_{encoder}": partial(
        _image,
        "segmentation_models_pytorch",
        name,
        encoder_name=encoder,
        encoder_weights=None,
        classes=4,
    )
    for name, encoder in (
        *((decoder, "resnet18") for decoder in ("Unet", "UnetPlusPlus", "FPN", "Linknet", "MAnet")),
        *((decoder, "resnet18") for decoder in ("DeepLabV3", "DeepLabV3Plus", "UPerNet")),
        ("PSPNet", "resnet18"),
        ("Segformer", "mit_b0"),
        ("Unet", "mobilenet_v2"),
        ("FPN", "efficientnet-b0"),
    )
}

# --- transformers ----------------------------------------------------------------------------

VIT = {"image_size": 32, "patch_size": 8, "num_classes": CLASSES, "dim": 32, "heads": 4}
DEEP = VIT | {"depth": 2, "mlp_dim": 64}
TWINS = {f"s{s}_local_patch_size": size for s, size in enumerate((4, 4, 2), 1)}
TWINS |= {f"s{s}_global_k": 2 for s in (1, 2, 3, 4)}


def _vit(module: str, name: str, *, size: int = 32, **options: Any) -> Made:
    return _image(f"vit_pytorch.{module}", name, size=size, **options)


VIT_PYTORCH = {
    "vit": partial(_vit, "vit", "ViT", **DEEP),
    "simple_vit": partial(_vit, "simple_vit", "SimpleViT", **DEEP),
    "register_vit": partial(_vit, "simple_vit_with_register_tokens", "SimpleViT", **DEEP),
    "qk_norm_vit": partial(_vit, "simple_vit_with_qk_norm", "SimpleViT", **DEEP),
    "deepvit": partial(_vit, "deepvit", "DeepViT", **DEEP),
    "parallel_vit": partial(_vit, "parallel_vit", "ViT", **DEEP),
    "small_dataset_vit": partial(_vit, "vit_for_small_dataset", "ViT", **DEEP),
    "cait": partial(_vit, "cait", "CaiT", **DEEP, cls_depth=1),
    "xcit": partial(_vit, "xcit", "XCiT", **DEEP, cls_depth=1),
    "max_vit": partial(
        _vit,
        "max_vit",
        "MaxViT",
        size=64,
        num_classes=CLASSES,
        dim=16,
        dim_head=8,
        depth=(1, 1),
        window_size=4,
    ),
    "cvt": partial(_vit, "cvt", "CvT", size=64, num_classes=CLASSES),
    "nest": partial(
        _vit,
        "nest",
        "NesT",
        image_size=32,
        patch_size=4,
        dim=16,
        heads=2,
        num_hierarchies=2,
        block_repeats=(1, 1),
        num_classes=CLASSES,
    ),
    "twins_svt": partial(_vit, "twins_svt", "TwinsSVT", size=64, num_classes=CLASSES, **TWINS),
    "mobile_vit": partial(
        _vit,
        "mobile_vit",
        "MobileViT",
        size=64,
        image_size=(64, 64),
        dims=[24, 32, 40],
        channels=[8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64],
        num_classes=CLASSES,
    ),
}


def _language(layers: str = "Decoder", **options: Any) -> Made:
    attention = _from("x_transformers", layers, dim=32, depth=2, heads=4, **options)
    model = _from(
        "x_transformers",
        "TransformerWrapper",
        num_tokens=VOCABULARY,
        max_seq_len=TOKENS,
        attn_layers=attention,
    )
    return model, _whole(VOCABULARY, TOKENS)


X_TRANSFORMERS = {
    "decoder": _language,
    "encoder": partial(_language, "Encoder"),
    "rotary": partial(_language, rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True),
    "grouped_queries": partial(_language, attn_kv_heads=2, ff_swish=True),
    "alibi": partial(_language, "Encoder", alibi_pos_bias=True),
}


def _clip(layers: Any, **vision: Any) -> Made:
    text = {
        "context_length": TOKENS,
        "vocab_size": VOCABULARY,
        "width": 32,
        "heads": 4,
        "layers": 2,
    }
    seen = {"image_size": 64, "layers": layers, "width": 32} | vision
    model = _from("open_clip.model", "CLIP", embed_dim=24, vision_cfg=seen, text_cfg=text)
    return model, _together(image_draw(64), _whole(VOCABULARY, TOKENS))


OPEN_CLIP = {
    "vit": partial(_clip, 2, patch_size=16, head_width=8),
    "resnet": partial(_clip, [1, 1, 1, 1], head_width=8),
}

# --- volumes, and anything -------------------------------------------------------------------

UNET = {"channels": (8, 16, 32), "strides": (2, 2), "spatial_dims": 2}
PLANE = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}


def _monai(name: str, *, size: int = 32, **options: Any) -> Made:
    draw = image_draw(size, channels=options["in_channels"])
    return _from("monai.networks.nets", name, **options), draw


MONAI = {
    "unet": partial(_monai, "UNet", **PLANE | UNET, num_res_units=1),
    "attention_unet": partial(_monai, "AttentionUnet", **PLANE | UNET),
    "basic_unet": partial(_monai, "BasicUNet", **PLANE, features=(8, 8, 16, 16, 32, 8)),
    "segresnet": partial(_monai, "SegResNet", **PLANE, init_filters=8),
    "vnet": partial(_monai, "VNet", spatial_dims=2, in_channels=1, out_channels=2),
    "dynunet": partial(
        _monai,
        "DynUNet",
        **PLANE,
        kernel_size=(3, 3, 3),
        strides=(1, 2, 2),
        upsample_kernel_size=(2, 2),
        filters=(8, 16, 32),
    ),
    "unetr": partial(
        _monai,
        "UNETR",
        **PLANE,
        img_size=32,
        feature_size=8,
        hidden_size=32,
        mlp_dim=64,
        num_heads=4,
    ),
    "swin_unetr": partial(_monai, "SwinUNETR", size=64, **PLANE, feature_size=12),
    "densenet": partial(_monai, "DenseNet121", **PLANE),
    "autoencoder": partial(_monai, "AutoEncoder", **PLANE, channels=(8, 16), strides=(2, 2)),
}


def _sam_encoder() -> Made:
    options = {"embed_dim": 32, "depth": 2, "num_heads": 4, "out_chans": 16, "window_size": 2}
    return _image(
        "segment_anything.modeling",
        "ImageEncoderViT",
        img_size=64,
        patch_size=16,
        use_rel_pos=True,
        global_attn_indexes=(1,),
        **options,
    )


def _sam_transformer() -> Made:
    model = _from(
        "segment_anything.modeling",
        "TwoWayTransformer",
        depth=2,
        embedding_dim=32,
        num_heads=4,
        mlp_dim=64,
    )
    image = tensor_draw(32, 4, 4)
    return model, _together(image, image, tensor_draw(5, 32))


SEGMENT_ANYTHING = {"encoder": _sam_encoder, "two_way": _sam_transformer}

# By the name of the package that must be there.
LIBRARIES: Mapping[str, Mapping[str, Callable[[], Made]]] = {
    "torch": TORCH,
    "diffusers": DIFFUSERS,
    "ultralytics": ULTRALYTICS,
    "segmentation_models_pytorch": SMP,
    "vit_pytorch": VIT_PYTORCH,
    "x_transformers": X_TRANSFORMERS,
    "open_clip": OPEN_CLIP,
    "monai": MONAI,
    "segment_anything": SEGMENT_ANYTHING,
}


def names() -> list[str]:
    """`library/model` for every library that is installed; says which are not."""
    found = []
    for library, models in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: {len(models)} models skipped", file=sys.stderr)
            continue
        found += [f"{library}/{model}" for model in models]
    return found


def raw_case(name: str) -> Case:
    """A model as its library initialises it."""
    library, _, model = name.partition("/")
    made, draw = LIBRARIES[library][model]()
    return Case(made, draw, kind=library)

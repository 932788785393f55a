"""Small random models of Hugging Face transformers, from their configuration classes alone."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Case, Draw


SMOKE = "bert"
VOCABULARY = 100
TOKENS = 8  # of a text; the first three numbers are padding, begin and end
IMAGE = 64
HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS = 64, 128, 2, 4, 2
SPREAD = 0.125  # standard deviation of weights: activations of order one at this width
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Draws = dict[str, Callable[[torch.Generator, int], Tensor]]


def _ids(generator: torch.Generator, batch: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, TOKENS), generator=generator)


def _texts_with_end(generator: torch.Generator, batch: int) -> Tensor:
    ids = _ids(generator, batch)
    ids[:, -1] = SPECIAL["eos_token_id"]
    return ids


def _whole(_generator: torch.Generator, batch: int) -> Tensor:
    return torch.ones(batch, TOKENS, dtype=torch.int64)


def _padded(generator: torch.Generator, batch: int) -> Tensor:
    mask = _whole(generator, batch)
    mask[:, -2:] = 0
    return mask


def _pixels(generator: torch.Generator, batch: int) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float64)


def _spectrogram(generator: torch.Generator, batch: int) -> Tensor:
    return torch.randn(batch, 16, 40, generator=generator, dtype=torch.float64)


READ: Draws = {"input_ids": _ids, "attention_mask": _padded}
CONTINUE: Draws = {"input_ids": _ids, "attention_mask": _whole}
TRANSLATE: Draws = {"input_ids": _ids, "attention_mask": _padded, "decoder_input_ids": _ids}
TRANSCRIBE: Draws = {"input_features": _spectrogram, "decoder_input_ids": _ids}
SEE: Draws = {"pixel_values": _pixels}
PAIR: Draws = {"input_ids": _texts_with_end, "attention_mask": _whole, "pixel_values": _pixels}


def _encoder(**options: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "initializer_range": SPREAD,
    }
    return sizes | options


def _text(**options: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "max_position_embeddings": 32} | SPECIAL | options


def _decoder(**options: Any) -> dict[str, Any]:
    grouped = {"num_key_value_heads": KEY_HEADS, "use_cache": False}
    return _encoder(**_text(**grouped), **options)


def _vision(patch: int) -> dict[str, Any]:
    return _encoder(image_size=IMAGE, patch_size=patch, num_labels=10)


# Name: model class, configuration, inputs, the input that `generate` continues.
MODELS: dict[str, tuple[str, dict[str, Any], Draws, str | None]] = {
    "bert": ("BertForSequenceClassification", _encoder(**_text()), READ, None),
    "roberta": ("RobertaForMaskedLM", _encoder(**_text()), READ, None),
    "distilbert": (
        "DistilBertForQuestionAnswering",
        _text(
            dim=HIDDEN, hidden_dim=INNER, n_layers=LAYERS, n_heads=HEADS, initializer_range=SPREAD
        ),
        READ,
        None,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "initializer_range": SPREAD,
            "use_cache": False,
            **SPECIAL,
        },
        CONTINUE,
        "input_ids",
    ),
    "llama": ("LlamaForCausalLM", _decoder(), CONTINUE, "input_ids"),
    "mistral": (
        "MistralForCausalLM",
        _decoder(sliding_window=4, head_dim=16),
        CONTINUE,
        "input_ids",
    ),
    "qwen2": ("Qwen2ForCausalLM", _decoder(), CONTINUE, "input_ids"),
    "gemma": ("GemmaForCausalLM", _decoder(head_dim=16), CONTINUE, "input_ids"),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": HIDDEN // HEADS,
            "d_ff": INNER,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "use_cache": False,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        TRANSLATE,
        "input_ids",
    ),
    "vit": ("ViTForImageClassification", _vision(16), SEE, None),
    "dinov2": ("Dinov2ForImageClassification", _vision(16), SEE, None),
    "clip": (
        "CLIPModel",
        {
            "text_config": _encoder(**_text(projection_dim=48)),
            "vision_config": _encoder(image_size=IMAGE, patch_size=16, projection_dim=48),
            "projection_dim": 48,
        },
        PAIR,
        None,
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 16,
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "init_std": SPREAD,
            "use_cache": False,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
            **SPECIAL,
        },
        TRANSCRIBE,
        "input_features",
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "depths": [2, 2, 2, 2],
            "hidden_sizes": [16, 32, 40, 64],
            "num_attention_heads": [1, 2, 5, 4],
            "decoder_hidden_size": 48,
            "initializer_range": SPREAD,
            "num_labels": 10,
        },
        SEE,
        None,
    ),
}


@cache
def _classes(model_class: str) -> tuple[type[nn.Module], type[Any]]:
    import transformers  # noqa: PLC0415 - seconds, which other suites need not wait

    model = getattr(transformers, model_class)
    return model, model.config_class


def names() -> Sequence[str]:
    """The architectures."""
    return list(MODELS)


def raw_case(name: str) -> Case:
    """A model as transformers initialises it."""
    model_class, options, draws, prompt = MODELS[name]
    model, config = _classes(model_class)
    return Case(model(config(**options)), _draw(draws), prompt=prompt, kind=_kind(model_class))


def _kind(model_class: str) -> str:
    return "classification" if model_class.endswith("Classification") else model_class


def _draw(draws: Draws) -> Draw:
    def draw(generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        return {name: part(generator, batch) for name, part in draws.items()}

    return draw

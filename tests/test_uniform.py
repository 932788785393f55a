"""Uniform widths: the same in every layer of one role, said by a configuration, loaded by the model's own class."""

import functools
import importlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import swan_surgery as swan
from swan_surgery.artifacts import container
from swan_surgery.artifacts.structures import pack, unpack
from swan_surgery.models.configurations import misfit
from tests.closing import learnt_


pytestmark = [
    pytest.mark.slow,
    # Of so few units a step is a large part of the budget.
    pytest.mark.filterwarnings("ignore:uniform widths leave:swan_surgery.SwanWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

TOKENS = {"input_ids": torch.arange(5)[None]}
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**COMMON, "vocab_size": 40, "max_position_embeddings": 64}
IMAGES = {"pixel_values": torch.ones(1, 3, 16, 16)}
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig, TEXT, TOKENS),
    "llama": (LlamaForCausalLM, LlamaConfig, {**TEXT, "num_key_value_heads": 2}, TOKENS),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**TEXT, "num_key_value_heads": 2}, TOKENS),
    "vit": (ViTForImageClassification, ViTConfig, {**COMMON, "image_size": 16, "patch_size": 8}, IMAGES),
}  # fmt: skip


@functools.cache
def gated_once(name: str) -> swan.GatedModel:
    kind, config, numbers, inputs = MODELS[name]
    torch.manual_seed(0)
    return swan.swanify(kind(config(**numbers)).eval(), inputs)


@functools.cache
def small_of(name: str, macs: float = 0.6) -> PreTrainedModel:
    gated = gated_once(name)
    return swan.prune_by_score(gated, swan.importance(gated, "random"), macs=macs, uniform=True)


def base_of(name: str) -> PreTrainedModel:
    kind, config, numbers, _ = MODELS[name]
    return kind(config(**numbers)).eval()


class TestConfigurations:
    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_the_class_builds_it_again_from_its_own_folder(self, name, tmp_path, recwarn) -> None:
        gated, small, inputs = gated_once(name), small_of(name), MODELS[name][3]
        total = swan.count_macs(gated, inputs)
        assert 0.55 * total < swan.count_macs(small, inputs) <= 0.6 * total
        assert gated.config.to_dict() == base_of(name).config.to_dict()
        small.save_pretrained(tmp_path)
        assert not [own for own in recwarn if issubclass(own.category, swan.SwanWarning)]
        again = type(small).from_pretrained(tmp_path).eval()
        found, wanted = again(**inputs).logits, small.eval()(**inputs).logits
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)

    def test_grouped_heads_keep_their_width_and_their_groups(self) -> None:
        for name in ("llama", "qwen2"):
            config = small_of(name).config
            assert config.num_attention_heads == 2 * config.num_key_value_heads == 2
            assert config.head_dim == 8

    def test_where_heads_share_the_trunk_both_shrink_together(self) -> None:
        config = small_of("bert").config
        assert config.hidden_size == 8 * config.num_attention_heads < 32

    def test_a_fresh_process_generates_the_same(self, tmp_path) -> None:
        small = small_of("llama", 0.35).eval()
        assert small.config.hidden_size % small.config.num_attention_heads == 0
        swan.save_pretrained(small, tmp_path)
        wanted = small.generate(
            **TOKENS, max_new_tokens=6, do_sample=False, cache_implementation="static"
        )
        script = (
            "import sys, torch\n"
            "from transformers import AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
            "made = model.generate(torch.arange(5)[None], max_new_tokens=6, do_sample=False)\n"
            "print(made[0].tolist(), 'swan_surgery' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == f"{wanted[0].tolist()} False"
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
            "LlamaForCausalLM"
        ]
        assert "LlamaForCausalLM.from_pretrained(folder)" in (tmp_path / "README.md").read_text()
        loaded = swan.load(tmp_path, base_of("llama"))
        assert torch.equal(loaded(**TOKENS).logits, small(**TOKENS).logits)
        assert misfit(loaded) is None

    def test_other_readers_find_weights_alone(self, tmp_path) -> None:
        small = small_of("llama")
        swan.save_pretrained(small, tmp_path)
        read = importlib.import_module("accelerate.utils").load_state_dict
        weights = read(str(tmp_path / "model.safetensors"))
        assert weights.keys() <= small.state_dict().keys()
        found = type(small).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(found[1].values())

    def test_buffers_beside_the_weights_belong_to_them(self, tmp_path) -> None:
        small, others = small_of("llama"), tmp_path / "others"
        swan.save_pretrained(small, tmp_path)
        buffers = tmp_path / "buffers.safetensors"
        loaded = swan.load(tmp_path / "model.safetensors", base_of("llama"))
        assert torch.equal(loaded(**TOKENS).logits, small.eval()(**TOKENS).logits)
        whole = buffers.read_bytes()
        swan.save(nn.Linear(2, 2), buffers)
        with pytest.raises(
            swan.ArtifactError, match=r"buffers\.safetensors holds 2 buffers, and not"
        ):
            swan.load(tmp_path, base_of("llama"))
        buffers.write_bytes(whole)
        others.mkdir()
        (others / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
        with pytest.raises(swan.ArtifactError, match=r"buffers\.safetensors: no such file"):
            swan.load(others, base_of("llama"))
        swan.save_pretrained(nn.Linear(2, 2), tmp_path)  # what is there of an older model goes
        assert not buffers.exists()

    def test_kept_channels_differ_by_layer(self) -> None:
        kept = swan.kept(small_of("llama"))
        one, two = (kept[f"model.layers.{layer}.mlp.up_proj.weight"][0] for layer in (0, 1))
        assert len(one) == len(two)
        assert one != two

    def test_rounding_ceilings_and_gates(self) -> None:
        gated = gated_once("llama")
        scores = swan.importance(gated, "random")
        small = swan.prune_by_score(gated, scores, widths={"*.gate_proj": 16}, uniform=True)
        assert (small.config.intermediate_size, small.config.hidden_size) == (16, 32)
        small = swan.prune_by_score(gated, scores, macs=0.6, round_to=8, uniform=True)
        assert not {small.config.intermediate_size % 8, small.config.hidden_size % 8} - {0}
        gated.close("model.layers.0.mlp.gate_proj", range(10))
        gated.close("model.layers.1.mlp.gate_proj", range(20))
        small = swan.prune(gated, uniform=True)  # nothing that is open closes
        assert small.config.intermediate_size == 38
        with torch.no_grad():
            gated.gates.logits.fill_(3.0)

    def test_a_second_cut_goes_on(self) -> None:
        small = small_of("vit")
        again = swan.prune(learnt_(swan.swanify(small, IMAGES)), macs=0.7, uniform=True)
        assert again.config.intermediate_size < small.config.intermediate_size
        assert misfit(again) is None

    def test_what_no_number_says_stays_whole(self) -> None:
        """The trunk is the model's output: it is pinned, and with it the number that says the heads too."""
        torch.manual_seed(0)
        base = BertModel(BertConfig(**TEXT)).eval()
        gated = swan.swanify(base, TOKENS)
        small = swan.prune_by_score(gated, swan.importance(gated, "random"), macs=0.8, uniform=True)
        assert (small.config.hidden_size, small.config.num_attention_heads) == (32, 4)
        assert small.config.intermediate_size < 48


class TestRefused:
    def test_widths_that_differ_are_named_with_the_way_out(self, tmp_path) -> None:
        gated = gated_once("llama")
        widths = {f"model.layers.{layer}.mlp.gate_proj": 20 + layer for layer in (0, 1)}
        small = swan.prune_by_score(gated, swan.importance(gated, "random"), widths=widths)
        with pytest.warns(
            swan.SwanWarning,
            match=r"intermediate_size=48 would have to be 20 in 'model\.layers\.0.* and 21 in .*uniform=True",
        ):
            small.save_pretrained(tmp_path)
        swan.save_pretrained(small, tmp_path)
        assert "swan.load(folder, model=LlamaForCausalLM" in (tmp_path / "README.md").read_text()

    def test_a_file_that_sets_other_numbers(self, tmp_path) -> None:
        swan.save(small_of("vit"), tmp_path / "x.swan")
        header, tensors = container.read(tmp_path / "x.swan")
        for name, value in (("hidden_size", 64), ("num_hidden_layers", "1"), ("__class__", 1)):
            provenance = json.loads(unpack(header["provenance"]))
            provenance["steps"][0]["data"]["configuration"][name] = value
            other = {**header, "provenance": pack(json.dumps(provenance))}
            container.write(tmp_path / "y.swan", other, tensors)
            with pytest.raises(swan.ArtifactError, match=f"sets '{name}' of the configuration"):
                swan.load(tmp_path / "y.swan", base_of("vit"))


class Blocks(nn.Module):
    """No configuration: roles go by name."""

    def __init__(self, num: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(num)
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_layers_called_alike_get_one_width() -> None:
    gated = swan.swanify(Blocks().double(), torch.zeros(2, 6, dtype=torch.float64))
    small = swan.prune_by_score(gated, swan.importance(gated, "random"), macs=0.5, uniform=True)
    widths = {block[0].out_features for block in small.blocks}
    assert len(widths) == 1
    total = swan.count_macs(gated, gated.example_inputs)
    assert 0.4 * total < swan.count_macs(small, gated.example_inputs) <= 0.5 * total
    one, two = (swan.kept(small)[f"blocks.{i}.0.weight"][0] for i in (0, 1))
    assert one != two


def test_compress_takes_it_too() -> None:
    data = [torch.randn(32, 6) for _ in range(4)]
    small = swan.compress(Blocks(), data, macs=0.5, uniform=True, progress=False).model
    assert len({block[0].out_features for block in small.blocks}) == 1


def test_weights_in_the_folder_are_plain_safetensors(tmp_path) -> None:
    swan.save_pretrained(small_of("bert"), tmp_path)
    state = small_of("bert").state_dict()
    held = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(held[name], tensor) for name, tensor in state.items())


def test_a_reader_that_knows_llamas_configuration_alone_finds_every_tensor(tmp_path) -> None:
    """What converters and other runtimes do: shapes by config.json, tensors by safetensors, no transformers, no torch."""
    small = small_of("llama", 0.35)
    small.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    trunk, inner, words = said["hidden_size"], said["intermediate_size"], said["vocab_size"]
    queries, shared = (
        said[name] * said["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")
    )
    layer = {
        "self_attn.q_proj": [queries, trunk],
        "self_attn.k_proj": [shared, trunk],
        "self_attn.v_proj": [shared, trunk],
        "self_attn.o_proj": [trunk, queries],
        "mlp.gate_proj": [inner, trunk],
        "mlp.up_proj": [inner, trunk],
        "mlp.down_proj": [trunk, inner],
        "input_layernorm": [trunk],
        "post_attention_layernorm": [trunk],
    }
    wanted = {
        "model.embed_tokens": [words, trunk],
        "model.norm": [trunk],
        "lm_head": [words, trunk],
    }
    for index in range(said["num_hidden_layers"]):
        wanted |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    wanted = {f"{name}.weight": shape for name, shape in wanted.items()}
    assert _shapes_in(tmp_path / "model.safetensors") == wanted
    swan.save_pretrained(small, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == said
    ours = _shapes_in(tmp_path / "ours" / "model.safetensors")
    # Beside the weights it has the buffers that transformers computes anew, which such readers pass over.
    assert {name: shape for name, shape in ours.items() if "rotary_emb" not in name} == wanted
    assert trunk < 32
    assert inner < 48


def _shapes_in(file) -> dict[str, list[int]]:
    with safe_open(file, framework="numpy") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118

"""SwanTrainerCallback in real Trainer runs of a few steps: budget, pruning, logs, checkpoints, resuming."""

import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import swan_surgery as swan
from swan_surgery.integrations.hf import SwanTrainerCallback


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Classifier(nn.Module):
    """Takes keyword arguments and returns its loss, as the Trainer wants; with batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.head = nn.Linear(8 * 4 * 4, 4)

    def forward(self, pixels, labels):
        logits = self.head(self.features(pixels).flatten(1))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def images(num: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, 3, 8, 8, generator=generator)
    return [{"pixels": x[i], "labels": torch.tensor(i % 4)} for i in range(num)]


def collate(rows) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def gated_classifier() -> swan.GatedModel:
    torch.manual_seed(0)
    example = {"pixels": torch.zeros(2, 3, 8, 8), "labels": torch.tensor([0, 1])}
    return swan.swanify(Classifier(), example)


def arguments(folder, **options) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 0.01,
        "use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no", "seed": 3,
        "disable_tqdm": True, "remove_unused_columns": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def train(gated, callback, args, *, data=None, more=(), resume=None) -> Trainer:
    groups = swan.parameter_groups(gated, lr=0.01, gate_lr=0.2)
    trainer = Trainer(
        gated,
        args,
        train_dataset=data or images(),
        data_collator=collate,
        callbacks=[callback, *more],
        optimizers=(torch.optim.AdamW(groups), None),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def make(learning: str = "curvature", **options) -> tuple[swan.GatedModel, SwanTrainerCallback]:
    gated = gated_classifier()
    ramp = swan.CosineRamp(0, 1)
    objective = swan.Objective(gated, macs=0.5, learning=learning, ramp=ramp, **options)
    return gated, SwanTrainerCallback(objective)


@pytest.mark.parametrize("learning", ["curvature", "gradient"])
def test_the_pruned_model_is_what_the_gated_one_became(learning, tmp_path) -> None:
    gated, callback = make(learning)
    trainer = train(gated, callback, arguments(tmp_path))
    small = callback.pruned
    assert type(small) is Classifier
    total = swan.count_macs(gated, gated.example_inputs)
    assert swan.count_macs(small, gated.example_inputs) == swan.hard_macs(gated) <= 0.5 * total
    batch = collate(images(5))
    with torch.no_grad():
        found, wanted = small.eval()(**batch)["logits"], gated.eval()(**batch)["logits"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(gated)  # statistics of all training data, under the final gates
    swan.calibrate(twin, [collate(images())])
    torch.testing.assert_close(
        twin.model.features[1].running_var, gated.model.features[1].running_var
    )
    rows = [row for row in trainer.state.log_history if "loss" in row]
    budgets = [row["swan/macs_budget"] for row in rows]
    assert budgets == pytest.approx([1.0, 0.875, 0.625, 0.5, 0.5, 0.5])
    assert all(row["swan/hard_macs_ratio"] <= row["swan/macs_budget"] for row in rows)


class RoutedClassifier(nn.Module):
    """What the Trainer wants around a routed model: a forward that returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 4 * 4, 4),
        )  # fmt: skip
        example = {"input": torch.zeros(2, 3, 8, 8)}
        self.routed = swan.add_switch(net, "2", example_inputs=example, light=0.5, mask=True)

    def forward(self, pixels, labels):
        return {"loss": self.routed.loss({"input": pixels, "labels": labels})}


def test_a_routed_model_is_trained_with_its_mask_and_the_mask_is_cut(tmp_path) -> None:
    torch.manual_seed(0)
    model = RoutedClassifier()
    routed = model.routed
    objective = swan.Objective(routed.gated, macs=0.6, ramp=swan.CosineRamp(0, 1))
    callback = SwanTrainerCallback(objective, inputs_of=lambda batch: {"input": batch["pixels"]})
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=images(),
        data_collator=collate,
        callbacks=[callback],
        optimizers=(torch.optim.AdamW(swan.parameter_groups(routed.gated, lr=0.01)), None),
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["swan/hard_macs_ratio"] <= 0.6
    small = callback.pruned
    assert isinstance(small, swan.RoutedModel)
    assert small.crossing_bytes() < routed.crossing_bytes()
    x = collate(images(5))["pixels"]
    small.thresholds = routed.thresholds = [float("inf")]
    torch.testing.assert_close(small.eval()(x), routed.eval()(x), rtol=1e-4, atol=1e-5)


def test_other_callbacks_see_the_values(tmp_path) -> None:
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    gated, callback = make()
    train(gated, callback, arguments(tmp_path, max_steps=1), more=[Watch()])
    assert {"loss", "swan/hard_macs_ratio"} <= seen[0]
    assert "train_runtime" in seen[-1]  # the summary is no step: the gates' values stand there once
    assert not any(name.startswith("swan/") for name in seen[-1])


def test_a_step_is_that_of_the_plain_loop(tmp_path) -> None:
    """With penalties: gradient of loss + objective, also where two batches make one step."""
    options = {"l0": 0.3, "learning": "gradient", "ramp": {"l0": swan.CosineRamp(0, 0)}}
    gated, twin = gated_classifier(), gated_classifier()
    callback = SwanTrainerCallback(swan.Objective(gated, **options))
    args = arguments(
        tmp_path, gradient_accumulation_steps=3, num_train_epochs=2, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    batches: list[dict[str, torch.Tensor]] = []
    handle = gated.register_forward_pre_hook(
        lambda model, args, kwargs: batches.append(kwargs) if model.training else None,
        with_kwargs=True,
    )
    train(gated, callback, args)
    handle.remove()
    assert len(batches) == 6
    objective = swan.Objective(twin, **options)
    optimizer = torch.optim.AdamW(swan.parameter_groups(twin, lr=0.01, gate_lr=0.2))
    twin.train()
    for step in range(2):
        optimizer.zero_grad()
        for batch in batches[3 * step : 3 * step + 3]:
            (twin(**batch)["loss"] / 3).backward()
        objective(float(step)).backward()
        optimizer.step()
    torch.testing.assert_close(gated.gates.logits, twin.gates.logits, rtol=1e-4, atol=1e-5)
    assert callback.objective.log()["l0_raw"] == pytest.approx(objective.log()["l0_raw"], rel=1e-5)
    assert objective.log()["l0"] > 0


@pytest.mark.parametrize("learning", ["curvature", "gradient"])
def test_resuming_goes_on_where_it_stopped(learning, tmp_path) -> None:
    options = {"num_train_epochs": 3, "save_strategy": "epoch", "lr_scheduler_type": "constant"}
    gated, callback = make(learning)
    train(gated, callback, arguments(tmp_path, **options))
    stored = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert "SwanTrainerCallback" in stored["stateful_callbacks"]
    again, last = make(learning)
    trainer = train(
        again, last, arguments(tmp_path / "again", **options), resume=str(tmp_path / "checkpoint-6")
    )
    assert [row["step"] for row in trainer.state.log_history if "loss" in row][-3:] == [7, 8, 9]
    assert last.objective.log() == callback.objective.log()
    for key, value in callback.pruned.state_dict().items():
        assert torch.equal(last.pruned.state_dict()[key], value), key


class Tied(nn.Module):
    """Token embeddings that are the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 16)
        self.back, self.head = nn.Linear(16, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, labels):
        logits = self.head(self.back(self.hidden(self.embedding(tokens)).relu()))
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_tied_weights_are_saved_and_stay_tied(tmp_path) -> None:
    def make_tied() -> tuple[swan.GatedModel, SwanTrainerCallback]:
        torch.manual_seed(0)
        gated = swan.swanify(Tied(), collate(rows[:2]))
        return gated, SwanTrainerCallback(swan.Objective(gated, macs=0.5))

    tokens = torch.randint(20, (16, 8))
    rows = [{"tokens": row, "labels": row.flip(0)} for row in tokens]
    options = {"num_train_epochs": 2, "save_strategy": "epoch", "lr_scheduler_type": "constant"}
    gated, callback = make_tied()
    train(gated, callback, arguments(tmp_path, **options), data=rows)
    again, last = make_tied()
    train(
        again, last, arguments(tmp_path / "again", **options), data=rows,
        resume=str(tmp_path / "checkpoint-2"),
    )  # fmt: skip
    for key, value in callback.pruned.state_dict().items():
        assert torch.equal(last.pruned.state_dict()[key], value), key
    assert last.pruned.head.weight is last.pruned.embedding.weight
    state = gated.state_dict()  # as it was before: the hook is gone
    one, two = (state[f"model.{name}.weight"] for name in ("head", "embedding"))
    assert one.data_ptr() == two.data_ptr()


def test_a_transformer(tmp_path) -> None:
    torch.manual_seed(0)
    config = BertConfig(  # type: ignore[call-arg]  # transformers takes more than it says
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    tokens = torch.randint(50, (16, 8))
    rows = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(tokens)]
    gated = swan.swanify(BertForSequenceClassification(config), collate(rows[:2]))
    callback = SwanTrainerCallback(swan.Objective(gated, macs=0.5))
    train(gated, callback, arguments(tmp_path), data=rows)
    small = callback.pruned
    assert type(small) is BertForSequenceClassification
    total = swan.count_macs(gated, gated.example_inputs)
    assert swan.count_macs(small, gated.example_inputs) <= 0.5 * total
    with torch.no_grad():
        found, wanted = (m.eval()(tokens[:4]).logits for m in (small, gated))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_trainer_finds_columns_labels_and_configuration_as_in_the_base_model(tmp_path) -> None:
    """What it reads off the signature of forward; without the labels no evaluation has a loss."""
    torch.manual_seed(0)
    config = BertConfig(  # type: ignore[call-arg]  # transformers takes more than it says
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    rows = [
        {"input_ids": row, "labels": torch.tensor(i % 3), "unused": torch.tensor(i)}
        for i, row in enumerate(torch.randint(50, (8, 8)))
    ]
    base = BertForSequenceClassification(config).eval()
    example = {"input_ids": rows[0]["input_ids"][None]}
    for in_place in (None, True):
        gated = swan.swanify(base, example, in_place=in_place)
        assert inspect.signature(gated.forward) == inspect.signature(base.forward)
        args = arguments(tmp_path, remove_unused_columns=True)
        found = Trainer(gated, args, eval_dataset=rows).evaluate()
        wanted = Trainer(base, args, eval_dataset=rows).evaluate()
        assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)
    assert gated.config is gated.model.config
    assert (gated.device, gated.dtype) == (base.device, base.dtype)


def test_save_pretrained_of_a_pruned_transformer_says_what_to_do(tmp_path) -> None:
    config = BertConfig(  # type: ignore[call-arg]  # transformers takes more than it says
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    base = BertForSequenceClassification(config).eval()
    small = swan.prune(swan.swanify(base, {"input_ids": torch.arange(8)[None]}), macs=0.5)
    swan.save(small, tmp_path / "x.swan")
    loaded = swan.load(tmp_path / "x.swan", BertForSequenceClassification(config))
    for model in (small, copy.deepcopy(small), loaded):
        with pytest.warns(swan.SwanWarning, match=r"cannot load this pruned model.* swan\.save"):
            model.save_pretrained(tmp_path / "folder")
        kept = load_file(tmp_path / "folder" / "model.safetensors")
        assert all(torch.equal(tensor, model.state_dict()[n]) for n, tensor in kept.items())


class TestRefused:
    def refused(self, match, folder, gated=None, callback=None, **options) -> None:
        own, made = make("gradient")
        with pytest.raises(swan.SwanError, match=match):
            Trainer(
                gated or own, arguments(folder, **options), callbacks=[callback or made],
                train_dataset=images(), data_collator=collate,
            )  # fmt: skip

    def test_another_model(self, tmp_path) -> None:
        self.refused(
            "is no part of GatedClassifier, which is trained", tmp_path, gated_classifier()
        )

    def test_columns_that_would_be_dropped(self, tmp_path) -> None:
        class TakesAnything(Classifier):
            def forward(self, **batch):
                return super().forward(**batch)

        example = {"pixels": torch.zeros(2, 3, 8, 8), "labels": torch.tensor([0, 1])}
        gated = swan.swanify(TakesAnything(), example)
        callback = SwanTrainerCallback(swan.Objective(gated, macs=0.5))
        options = {"remove_unused_columns": True}
        self.refused("remove_unused_columns=False", tmp_path, gated, callback, **options)

    def test_callbacks_that_would_be_made_anew(self, tmp_path) -> None:
        self.refused(
            "restores its own state", tmp_path, restore_callback_states_from_checkpoint=True
        )

    def test_gradients_that_would_stay_scaled(self, tmp_path, monkeypatch) -> None:
        gated, callback = make("gradient")
        args = arguments(tmp_path, max_grad_norm=0.0)
        monkeypatch.setattr(args, "fp16", True)  # which the Trainer itself refuses on a CPU
        with pytest.raises(swan.InputError, match="with fp16=True and max_grad_norm=0"):
            callback.on_init_end(args, None, None, model=gated)
        other = SwanTrainerCallback(swan.Objective(gated, macs=0.5))
        other.on_init_end(args, None, None, model=gated)

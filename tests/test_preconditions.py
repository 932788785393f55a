"""The checks at the edge, one by one."""

import warnings

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.gates.checks import check_gated, check_model
from swan_surgery.models.checks import infer_inputs
from tests.zoo import ZOO


class TestCheckModel:
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_ordinary_models_pass(self, name) -> None:
        check_model(ZOO[name]()[0])

    def test_a_gated_model_inside_another_is_named(self) -> None:
        inner = swan.swanify(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
        check_gated(inner)
        with pytest.raises(swan.ModelError, match=r"module 'a\.b' is gated already"):
            check_model(nn.ModuleDict({"a": nn.ModuleDict({"b": inner})}))

    def test_weights_of_a_quantized_layer_inside_are_named(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 4)))
        with pytest.raises(swan.ModelError, match=r"module 'head\.0' is quantized \(Linear\)"):
            check_model(nn.ModuleDict({"head": layer}))

    def test_quantization_aware_layers_are_refused(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).train()
            model.qconfig = torch.ao.quantization.get_default_qat_qconfig()
            prepared = torch.ao.quantization.prepare_qat(model)
        with pytest.raises(swan.ModelError, match=r"module '0' is quantized"):
            check_model(prepared)

    def test_the_message_carries_what_was_given(self) -> None:
        with pytest.raises(swan.ModelError, match="got str"):
            check_model("resnet18")
        with pytest.raises(swan.ModelError, match=r"got Linear; call swan\.swanify"):
            check_gated(nn.Linear(2, 2))
        with pytest.raises(swan.ModelError, match="got NoneType"):
            check_gated(None)


class TestInferInputs:
    def test_both_image_sizes_for_a_convolution(self) -> None:
        model = nn.Sequential(nn.Identity(), nn.Conv2d(5, 4, 3))
        shapes = [tuple(guess.args[0].shape) for guess in infer_inputs(model)]
        assert shapes == [(1, 5, 224, 224), (1, 5, 299, 299)]

    def test_one_row_for_a_linear_layer(self) -> None:
        (guess,) = infer_inputs(nn.Linear(7, 2))
        assert guess.args[0].shape == (1, 7)
        assert not guess.kwargs

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_the_dtype_of_the_model(self, dtype) -> None:
        (guess,) = infer_inputs(nn.Linear(7, 2).to(dtype))
        assert guess.args[0].dtype == dtype

    def test_the_random_state_is_not_touched(self) -> None:
        model = nn.Linear(7, 2)
        before = torch.get_rng_state()
        infer_inputs(model)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        "model",
        [nn.Identity(), nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)), nn.LSTM(3, 4)],
        ids=["nothing", "embedding", "lstm"],
    )
    def test_what_cannot_be_guessed(self, model) -> None:
        with pytest.raises(swan.InputError, match=r"pass example_inputs=\(tensor, \.\.\.\)"):
            infer_inputs(model)

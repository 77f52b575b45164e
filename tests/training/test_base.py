import numpy as np
import pytest
import torch

from training.base.mini import _resampled_positions, drop_layers


def llama(layers: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2
        )
    ).eval()


def test_dropping_layers_keeps_the_first_and_the_last_two_and_the_cache_still_works():
    model = llama(6)
    before = list(model.model.layers)
    drop_layers(model, 4)
    assert [before.index(layer) for layer in model.model.layers] == [0, 1, 4, 5]
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    whole = model(ids).logits[0, -1]
    head = model(ids[:, :4], use_cache=True)
    stepped = model(ids[:, 4:], past_key_values=head.past_key_values, use_cache=True).logits[0, -1]
    assert torch.allclose(whole, stepped, atol=1e-5)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("count", [2, 7])
def test_a_wrong_number_of_layers_is_refused(count: int):
    with pytest.raises(ValueError, match="give 3 to 6"):
        drop_layers(llama(6), count)


@pytest.mark.parametrize("patches", [16, 24])
def test_the_position_table_follows_the_image_size(patches: int):
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 1, 37)[:, None, None] + np.linspace(0, 2, 37)[None, :, None] + np.zeros((37, 37, 384))
    weights = {
        "onnx::Concat_1": rng.standard_normal((1, 1, 384)).astype(np.float32),
        "onnx::Reshape_2": smooth.reshape(1, 37 * 37, 384).astype(np.float32),
    }
    table = _resampled_positions(weights, patches)
    assert table.shape == (1, 1 + patches**2, 384)
    assert np.array_equal(table[:, :1], weights["onnx::Concat_1"])
    grid = table[0, 1:, 0].reshape(patches, patches)
    assert (np.diff(grid, axis=0) > 0).all() and (np.diff(grid, axis=1) > 0).all()

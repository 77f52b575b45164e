import pytest
import torch

from training.base import drop_layers


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

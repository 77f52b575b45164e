from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.vocabulary import domain_texts, restrict_vocabulary
from training.base import ModelAndTokenizers, load_model

COMMON = 40


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path, tiny_data: Path) -> tuple[ModelAndTokenizers, ModelAndTokenizers]:
    """The tiny model as it is, and with the words of one report alone."""
    full, restricted = (load_model(str(tiny_checkpoint), Path()) for _ in range(2))
    before, after = restrict_vocabulary(restricted, ["FINDINGS: The heart is normal in size."], COMMON)
    assert after < before == len(full.tokenizer) and after == len(restricted.tokenizer)
    return full, restricted


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text())
def test_any_text_is_still_encoded_and_comes_back(models: tuple, text: str):
    _, restricted = models
    assert restricted.tokenizer.decode(restricted.tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_text_of_the_domain_has_the_same_tokens(models: tuple):
    full, restricted = (parts.tokenizer for parts in models)
    text = "FINDINGS: The heart is normal in size."
    tokens = [t.convert_ids_to_tokens(t(text, add_special_tokens=False).input_ids) for t in (full, restricted)]
    assert tokens[0] == tokens[1]
    assert restricted.convert_ids_to_tokens(restricted.eos_token_id) == full.eos_token


def test_the_model_says_the_same_of_every_token_that_is_left(models: tuple):
    full, restricted = models
    text = "FINDINGS: The heart is normal in size."
    logits = []
    for parts in models:
        ids = torch.tensor([parts.tokenizer(text, add_special_tokens=False).input_ids])
        logits.append(parts.model.language_model(input_ids=ids).logits[0])
    kept = full.tokenizer.convert_tokens_to_ids(restricted.tokenizer.convert_ids_to_tokens(range(logits[1].shape[1])))
    assert torch.allclose(logits[0][:, kept], logits[1], atol=1e-5)
    assert restricted.model.config.text_config.vocab_size == len(kept)
    assert full.tokenizer.convert_ids_to_tokens(full.image_token_id) == restricted.tokenizer.convert_ids_to_tokens(
        restricted.image_token_id
    )


def test_the_query_side_reads_instruction_and_reports_as_before(models: tuple):
    restricted = models[1]
    texts = ["Describe the chest radiograph. View: frontal.", "FINDINGS: The heart is normal in size."]
    for text in texts:
        tokens, rows = [], []
        for parts in models:
            ids = parts.qformer_tokenizer(text).input_ids
            tokens.append(parts.qformer_tokenizer.convert_ids_to_tokens(ids))
            rows.append(parts.model.qformer.embeddings.word_embeddings(torch.tensor(ids)))
        assert tokens[0] == tokens[1] and torch.equal(*rows)
    sizes = [parts.model.qformer.embeddings.word_embeddings.weight.shape[0] for parts in models]
    assert sizes[1] < sizes[0] and sizes[1] == restricted.model.config.qformer_config.vocab_size


def test_the_words_of_a_collection_are_its_train_reports_and_all_that_is_told(tiny_data: Path):
    texts = domain_texts(tiny_data)
    assert any("The heart is enlarged." in text for text in texts)
    assert any("other abnormality" in text for text in texts)

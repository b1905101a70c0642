#!/usr/bin/env python3
"""Captures query, key and value of one attention layer of a trained model that reads a real text.

Made examples/data/minilm_layer3.safetensors; examples/data/README.md says how to run it. The model is
all-MiniLM-L6-v2, a BERT encoder with 6 layers of 12 heads of 32; its weights come from a PyPI package, and the
layers below the captured one run here in plain NumPy.
"""

import argparse
import json
import math
import re
import struct
import unicodedata
from pathlib import Path

import numpy as np

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_LICENSE = "Apache-2.0"


def read_safetensors(path):
    """All float32 tensors of a .safetensors file, by name."""
    data = Path(path).read_bytes()
    (header_size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        begin, end = (8 + header_size + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"])
    return tensors


def write_safetensors(path, tensors, metadata):
    """Writes float32 tensors; the header is padded so that the data starts at a multiple of 64 bytes."""
    header, offset = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4").tobytes())


def tokenize(text, vocabulary):
    """BERT's uncased WordPiece: words and punctuation, each split greedily into the longest known pieces."""
    text = unicodedata.normalize("NFD", text.lower())
    text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    tokens = ["[CLS]"]
    for word in re.findall(r"[^\W_]+|[^\w\s]|_", text):
        pieces, begin = [], 0
        while begin < len(word):
            for end in range(len(word), begin, -1):
                piece = word[begin:end] if begin == 0 else "##" + word[begin:end]
                if piece in vocabulary:
                    break
            else:
                pieces = ["[UNK]"]
                break
            pieces.append(piece)
            begin = end
        tokens += pieces
    return tokens + ["[SEP]"]


class Bert:
    """The encoder, for one sequence: hidden states are [M, hidden]."""

    def __init__(self, folder):
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        self.heads = config["num_attention_heads"]
        self.layers = config["num_hidden_layers"]
        self.epsilon = config["layer_norm_eps"]
        self.weights = read_safetensors(folder / "model.safetensors")
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        self.vocabulary = {token: index for index, token in enumerate(lines)}

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def layer_norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def embed(self, tokens):
        ids = [self.vocabulary[token] for token in tokens]
        name = "embeddings."
        x = self.weights[name + "word_embeddings.weight"][ids]
        x = x + self.weights[name + "position_embeddings.weight"][: len(ids)]
        x = x + self.weights[name + "token_type_embeddings.weight"][0]
        return self.layer_norm(x, name + "LayerNorm")

    def query_key_value(self, x, layer):
        """Three arrays [M, H, K]."""
        name = f"encoder.layer.{layer}.attention.self."
        shape = (len(x), self.heads, -1)
        return [self.linear(x, name + part).reshape(shape) for part in ("query", "key", "value")]

    def layer(self, x, layer):
        name = f"encoder.layer.{layer}."
        query, key, value = self.query_key_value(x, layer)
        attended = np.einsum("hij,jhk->ihk", probabilities(query, key), value).reshape(x.shape)
        attended = self.linear(attended, name + "attention.output.dense")
        x = self.layer_norm(x + attended, name + "attention.output.LayerNorm")
        inner = self.linear(x, name + "intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        return self.layer_norm(x + self.linear(inner, name + "output.dense"), name + "output.LayerNorm")


def probabilities(query, key):
    """softmax(query key^T / sqrt(K)), [H, Mq, Mkv]."""
    scores = np.einsum("ihk,jhk->hij", query, key) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder with config.json, vocab.txt and model.safetensors")
    parser.add_argument("text", help="text file to read")
    parser.add_argument("output", help=".safetensors file to write")
    parser.add_argument("--layer", type=int, default=3, help="layer to capture, from 0 (default: 3)")
    arguments = parser.parse_args()

    bert = Bert(arguments.model)
    tokens = tokenize(Path(arguments.text).read_text(encoding="utf-8"), bert.vocabulary)
    hidden = bert.embed(tokens)
    for layer in range(arguments.layer):
        hidden = bert.layer(hidden, layer)
    captured = bert.query_key_value(hidden, arguments.layer)
    query, key, value = (part[np.newaxis].astype(np.float32) for part in captured)

    p = probabilities(captured[0].astype(np.float64), captured[1].astype(np.float64))
    effective_keys = np.exp(-(p * np.log(p)).sum(-1)).mean(-1)
    print(f"{len(tokens)} tokens, {tokens.count('[UNK]')} unknown; query {query.shape}")
    print(f"keys that a query attends to, by head (exp of the entropy; uniform would be {len(tokens)}):")
    print(" ", " ".join(f"{keys:.1f}" for keys in effective_keys))

    write_safetensors(
        arguments.output,
        {"query": query, "key": key, "value": value},
        {
            "model": MODEL,
            "model_license": MODEL_LICENSE,
            "layer": f"{arguments.layer} of {bert.layers}, from 0",
            "text": Path(arguments.text).name,
            "made_by": "examples/capture_minilm.py",
        },
    )


if __name__ == "__main__":
    main()

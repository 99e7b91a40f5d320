"""The perplexity of an exported model, without nmbench."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def perplexity(folder, text, window=64):
    """The perplexity of a model folder, computed by transformers and torch alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"))["input_ids"])
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in windows.split(8)]).float()
    targets = windows[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets).double().exp().item()

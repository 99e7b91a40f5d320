"""Toy models that join their blocks in awkward ways: pairs, embeddings between blocks, containers, other signatures."""

import torch
from torch import Tensor, nn

from nmbench.models.bundle import Bundle


class Block(nn.Module):
    """A residual block with two linear layers; `form` is its forward."""

    def __init__(self, form) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.form = form

    def added(self, hidden: Tensor) -> Tensor:
        return 3 * self.two(self.one(self.norm(hidden)).relu())

    def forward(self, *args, **kwargs):
        return self.form(self, *args, **kwargs)


class Toy(nn.Module):
    """Three blocks of one `form`, joined by `join`."""

    def __init__(self, form, join) -> None:
        super().__init__()
        torch.default_generator.manual_seed(0)
        self.embedding, self.more = nn.Embedding(64, 8), nn.Embedding(64, 8)
        self.blocks = nn.ModuleList([Block(form) for _ in range(3)])
        self.head = nn.Linear(8, 64)
        self.join = join

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.join(self, self.embedding(input_ids), input_ids))


def plain(block: Block, hidden: Tensor) -> Tensor:
    return hidden + block.added(hidden)


def straight(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    for block in model.blocks:
        hidden = block(hidden)
    return hidden


def pairs(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    residual = None
    for block in model.blocks:
        hidden, residual = block(hidden, residual)
    return hidden + residual


def pair(block: Block, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    residual = hidden if residual is None else hidden + residual
    return block.added(residual), residual


def embeddings_between(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    for number, block in enumerate(model.blocks):
        hidden = block(hidden + 5 * model.more(ids) if number else hidden)
    return hidden


def sizes(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    for block in model.blocks:
        hidden = block(hidden, hidden.abs().mean((1, 2), keepdim=True))
    return hidden


def history(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    for block in model.blocks:
        hidden = block(hidden, seen)
    return hidden


def remembering(block: Block, hidden: Tensor, seen: list[Tensor]) -> Tensor:
    seen.append(block.added(hidden))
    return hidden + torch.stack(seen).mean(0)


def shared(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    left: dict[int, Tensor] = {}
    for number, block in enumerate(model.blocks):
        hidden = block(hidden, number, left)
    return hidden


def leaving(block: Block, hidden: Tensor, number: int, left: dict) -> Tensor:
    left[number] = block.added(hidden)
    return hidden + left[number] + left.get(number - 1, 0)


def within(block: Block, hidden: Tensor) -> Tensor:
    hidden += block.added(hidden)
    return hidden


def each(call, take=lambda output: output):
    """Joins blocks by `call(block, hidden, ids)`, of which `take` picks the hidden states."""

    def join(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
        for block in model.blocks:
            hidden = take(call(block, hidden, ids))
        return hidden

    return join


FORMS = {
    "plain": (plain, straight),
    "residual pairs": (pair, pairs),
    "embeddings between": (plain, embeddings_between),
    "arguments from tokens": (lambda b, h, t: h + b.added(h) * t[..., None] / 32, each(lambda b, h, ids: b(h, ids))),
    "masks from tokens": (
        lambda b, h, mask=None: h + b.added(h) * mask,
        each(lambda b, h, ids: b(h, mask=(ids > 20)[..., None])),
    ),
    "arguments from blocks above": (lambda b, h, size: h + size * b.added(h), sizes),
    "list": (lambda b, h: [plain(b, h)], each(lambda b, h, ids: b(h), lambda output: output[0])),
    "dict": (lambda b, h: {"h": plain(b, h)}, each(lambda b, h, ids: b(h), lambda output: output["h"])),
    "second": (lambda b, h: (None, plain(b, h)), each(lambda b, h, ids: b(h), lambda output: output[1])),
    "by another name": (lambda b, *, x: plain(b, x), each(lambda b, h, ids: b(x=h))),
    "not first": (lambda b, ids, h: plain(b, h), each(lambda b, h, ids: b(ids, h))),
    "one list for all": (remembering, history),
    "one dict for all": (leaving, shared),
    "in place": (within, straight),
}


def toy(form: str) -> Bundle:
    return Bundle.of("toy", Toy(*FORMS[form]), None)

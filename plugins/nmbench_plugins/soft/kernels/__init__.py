"""The soft mask and its gradient as Triton programs; `relaxation`, `noise` and `logits` compute the same in torch."""

"""What is measured against the dense model, in float64, from two models, one window, layer and token at a time."""

import torch


def divergence(dense, pruned, windows):
    """Mean KL(dense || pruned) in nats and share of equal argmax over all tokens that have a next one."""
    kl, equal = [], []
    for window in windows:
        p, q = (model(input_ids=window[None]).logits[0, :-1].double().softmax(-1) for model in (dense, pruned))
        for i in range(len(p)):
            kl.append(sum(p[i] * (p[i].log() - q[i].log())))
            equal.append(p[i].argmax() == q[i].argmax())
    return float(sum(kl)) / len(kl), float(sum(equal)) / len(equal)


def layer_error(dense, pruned, name, windows):
    """||X V^T - X W^T|| / ||X W^T||, X `[tokens, in]` being what the layer `name` is given in the dense model."""
    inputs = []
    hook = dense.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    for window in windows:
        dense(input_ids=window[None])
    hook.remove()
    x = torch.cat(inputs).flatten(0, -2)
    w, v = (model.get_submodule(name).weight.double() for model in (dense, pruned))
    if type(dense.get_submodule(name)).__name__ != "Conv1D":  # which stores [in, out]
        w, v = w.T, v.T
    return float((x @ v - x @ w).norm() / (x @ w).norm())

"""Training by its definition: one module, one optimiser, one batch after another. What fleets must equal."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from bench.build import build_model, build_task, torch_seed
from bench.data import device_split, epoch_plan
from bench.dropout import example_keys
from bench.member import learning_rate
from bench.spec import RunSpec


def train_plainly(spec: RunSpec) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The trained parameters, and the mean training loss of each epoch."""
    task = build_task(spec.task)
    cells = device_split(task, "train", spec.seed, torch.device("cpu"))
    model = build_model(spec, task, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.train.lr, weight_decay=spec.train.weight_decay)
    seed = torch.tensor([torch_seed(spec.seed, "dropout") % 2**31], dtype=torch.int32)
    step, losses = 0, []
    for epoch in range(spec.train.epochs):
        order, examples = epoch_plan([len(cell) for cell in cells], spec.train, [spec.seed], epoch)
        total = 0.0
        for index, chosen in zip(order, torch.from_numpy(examples[:, 0]), strict=True):
            cell, keys = cells[index], None
            if model.embed_dropout:
                keys = example_keys(seed, torch.tensor(step, dtype=torch.int32), len(chosen))[0, chosen >= 0]
            real = chosen[chosen >= 0]
            optimizer.param_groups[0]["lr"] = learning_rate(spec.train, step, len(order))
            labels_BM = cell.labels_NM[real]
            values = None if cell.values_NMK is None else cell.values_NMK[real]
            outputs = model(cell.inputs[real], cell.rows_NM[real], keys)
            if values is None:
                loss = F.cross_entropy(outputs.flatten(0, 1), labels_BM.flatten(), ignore_index=-100)
            else:
                loss = F.mse_loss(outputs[labels_BM >= 0], values[labels_BM >= 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(real)
            step += 1
        losses.append(total / sum(len(cell) for cell in cells))
    return {name: p.detach() for name, p in model.named_parameters()}, losses

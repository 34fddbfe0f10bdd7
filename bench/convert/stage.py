"""One stage of training: which parameters, which loss, which learning rate; one optimiser step at a time.

Shape legend: B batch, T time, D width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.convert import parallel
from bench.convert.align import alignment_backward
from bench.convert.compiled import compile_parts
from bench.convert.data import TrainingData
from bench.convert.losses import next_token_loss, shift_targets
from bench.convert.parameters import add_adapters, choose_parameters
from bench.convert.spec import Stage
from bench.convert.student import LinearizedForCausalLM
from bench.errors import UserError

PLATEAU_STEPS = 100
PLATEAU_PATIENCE = 10
PLATEAU_FACTOR = 0.1
WSD_DECAY = 0.2
"""Share of a warm-up, stable, decay schedule that is the decay."""


class StageTrainer:
    """Trains a student through one stage.

    Args:
        student: fp32 weights, which are the optimiser's masters; bf16 is used through autocast only.
        teacher: frozen.
        stage: what to do.
        index: of the stage in its recipe, part of what decides the batches.
        data: where batches come from.
        precision: "fp32" or "bf16".
        compiled: fuse the small operations of the layers, which pays on a GPU and many tokens.

    Raises:
        UserError: no parameter would train.
    """

    def __init__(
        self,
        student: LinearizedForCausalLM,
        teacher: Any,
        stage: Stage,
        index: int,
        data: TrainingData,
        precision: str,
        *,
        compiled: bool = False,
    ) -> None:
        self.teacher, self.stage, self.index, self.data = teacher, stage, index, data
        self.device, self.bf16 = student.device, precision == "bf16"
        self.rows = _rows(stage)
        self.micro_rows = self.rows if stage.micro_tokens is None else max(1, min(self.rows, stage.micro_tokens // stage.seq_len))
        self.tuner = add_adapters(student, stage)
        chosen = choose_parameters(student, teacher, stage)
        self.whole, self.student = student, parallel.sharded(student, stage)
        named = dict(self.student.named_parameters())
        groups = [(lr, [named[name] for name in params]) for lr, params in chosen]
        self.optimizer = torch.optim.AdamW(
            [{"params": params, "lr": lr, "peak": lr} for lr, params in groups],
            betas=stage.betas,
            weight_decay=stage.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.trained = [parameter for _, params in groups for parameter in params]
        self.step_number = self.tokens = 0
        self.plateau: dict[str, float] = {"factor": 1.0, "best": math.inf, "bad": 0, "sum": 0.0, "count": 0}
        self.restore_parts = compile_parts(self.student, teacher, stage) if compiled else lambda: None
        self.reader = ThreadPoolExecutor(1)
        self.upcoming: tuple[int, Future[Tensor]] | None = None
        self.student.train()

    def step(self, progress: float) -> dict[str, float]:
        """One optimiser step.

        Args:
            progress: share of the stage that is done, which sets the learning rate.

        Returns:
            The mean loss, and `kl` and `ce` where logits are compared.
        """
        factor = self._lr_factor(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self._stand_in(progress)
        tokens_BT = self._batch().to(self.device)
        sums: dict[str, Tensor] = {}
        for part in parallel.my_rows(tokens_BT).split(self.micro_rows):
            for name, value in self._backward(part, len(part) / len(tokens_BT)).items():
                sums[name] = sums[name] + value if name in sums else value
        nn.utils.clip_grad_norm_(self.trained, self.stage.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        totals = parallel.add_numbers(sums)
        self.step_number += 1
        self.tokens += tokens_BT.numel()
        self._watch_plateau(totals["loss"])
        return totals

    def _stand_in(self, progress: float) -> None:
        """While layers are replaced step by step, the teacher's attention speaks for those whose turn has not come."""
        shares = self.stage.replace
        if not shares:
            return
        layers = list(self.student.converted().items())
        own = max(1, round(shares[min(int(progress * len(shares)), len(shares) - 1)] * len(layers)))
        for turn, (index, layer) in zip(interleaved(len(layers)), layers, strict=True):
            layer.stand_in = () if turn < own else (self.teacher.model.layers[index].self_attn,)

    def _batch(self) -> Tensor:
        """The tokens of this step; those of the next are drawn while the device works."""
        batch, number = self._reading(self.step_number), self.step_number + 1
        self.upcoming = (number, self.reader.submit(self.data.batch, self.index, number, self.rows, self.stage.seq_len))
        return batch

    def _reading(self, number: int) -> Tensor:
        if self.upcoming is not None and self.upcoming[0] == number:
            return self.upcoming[1].result()
        return self.data.batch(self.index, number, self.rows, self.stage.seq_len)

    def halve_micro_batch(self) -> bool:
        """After running out of memory: smaller forward passes; False if one sequence is too much already."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.micro_rows == 1:
            return False
        self.micro_rows = (self.micro_rows + 1) // 2
        return True

    def finish(self) -> None:
        """Leaves the trained weights in the student that the stage was given, adapters merged."""
        self.reader.shutdown(cancel_futures=True)
        self.restore_parts()
        for layer in self.student.converted().values():
            layer.stand_in = ()
        if self.student is not self.whole:
            self.whole.load_state_dict(parallel.whole(self.student.state_dict()))
        if self.tuner is not None:
            self.tuner.merge_and_unload()
        self.whole.eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the stage depends on, tensors whole; all processes must ask for it together."""
        return {
            "student": parallel.whole(self.student.state_dict()),
            "optimizer": parallel.whole(self.optimizer.state_dict()),
            "step": self.step_number,
            "tokens": self.tokens,
            "plateau": self.plateau,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        with torch.no_grad():
            for name, tensor in self.student.state_dict().items():
                tensor.copy_(parallel.like(state["student"][name], tensor))
        for parameter, numbers in zip(self.trained, state["optimizer"]["state"].values(), strict=True):
            numbers |= {name: parallel.like(value, parameter) for name, value in numbers.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number, self.tokens, self.plateau = state["step"], state["tokens"], state["plateau"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)

    def _backward(self, tokens_BT: Tensor, share: float) -> dict[str, Tensor]:
        """Adds the gradient of a part of the batch, which is `share` of it; the losses stay on the device, nothing waits for it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.stage.capture != "logits":
                # FSDP takes the mean over processes, each of which has its share of the whole batch's mean.
                factor = share * self.stage.scale * parallel.size()
                loss = alignment_backward(self.student, self.teacher, tokens_BT, self.stage, factor)
                return {"loss": loss / parallel.size()}
            return self._distill_backward(tokens_BT, share)

    def _distill_backward(self, tokens_BT: Tensor, share: float) -> dict[str, Tensor]:
        stage, student = self.stage, self.student
        teacher_hidden = teacher_head = None
        if stage.kl:
            # First, because it has few launches for its work: meanwhile the student's many are queued.
            with torch.no_grad():
                teacher_hidden = self.teacher.model(input_ids=tokens_BT, use_cache=False).last_hidden_state.flatten(0, 1)
            teacher_head = self.teacher.lm_head.weight
        hidden = student.hidden(tokens_BT)
        low = torch.bfloat16 if self.bf16 else hidden.dtype
        loss, parts = next_token_loss(
            hidden.flatten(0, 1).to(low),
            cast(Any, student.lm).lm_head.weight,
            shift_targets(tokens_BT),
            ce=stage.ce,
            kl=stage.kl,
            z=stage.z,
            teacher_ND=None if teacher_hidden is None else teacher_hidden.to(low),
            teacher_head_VD=teacher_head,
            temperature=stage.temperature,
        )
        (loss * share * parallel.size()).backward()
        return {"loss": loss.detach() * share, "kl": parts[0] * share, "ce": parts[1] * share}

    def _lr_factor(self, progress: float) -> float:
        stage = self.stage
        if stage.warmup and progress < stage.warmup:
            return max(progress / stage.warmup, 1e-3)
        done = min(1.0, (progress - stage.warmup) / (1 - stage.warmup))
        if stage.schedule == "cosine":
            return stage.floor + (1 - stage.floor) * 0.5 * (1 + math.cos(math.pi * done))
        if stage.schedule == "wsd":
            return max(stage.floor, min(1.0, (1 - done) / WSD_DECAY))
        return max(stage.floor, self.plateau["factor"]) if stage.schedule == "plateau" else 1.0

    def _watch_plateau(self, loss: float) -> None:
        watch = self.plateau
        watch["sum"] += loss
        watch["count"] += 1
        if watch["count"] < PLATEAU_STEPS:
            return
        mean, watch["sum"], watch["count"] = watch["sum"] / watch["count"], 0.0, 0
        if mean < watch["best"]:
            watch["best"], watch["bad"] = mean, 0
        else:
            watch["bad"] += 1
        if watch["bad"] > PLATEAU_PATIENCE:
            watch["factor"], watch["bad"] = watch["factor"] * PLATEAU_FACTOR, 0


def interleaved(count: int) -> list[int]:
    """For each of `count` things in a row its turn, such that the first few turns are spread over the row."""
    bits = max(1, (count - 1).bit_length())
    order = sorted(range(count), key=lambda index: format(index, f"0{bits}b")[::-1])
    return [order.index(index) for index in range(count)]


def _rows(stage: Stage) -> int:
    """Sequences of a batch.

    Raises:
        UserError: the processes cannot share them equally.
    """
    rows = max(1, stage.batch_tokens // stage.seq_len)
    if rows % parallel.size():
        fitting = -(-rows // parallel.size()) * parallel.size() * stage.seq_len
        raise UserError(
            f"A batch of {stage.batch_tokens} tokens is {rows} sequences of {stage.seq_len}, which {parallel.size()} processes "
            f"cannot share equally; try --set stages.batch_tokens={fitting}."
        )
    return rows


@contextlib.contextmanager
def products_like_tf32(wanted: bool) -> Iterator[None]:
    """Under bf16 autocast the recurrences, which stay in fp32, may round products as TF32 does: still finer than bf16."""
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

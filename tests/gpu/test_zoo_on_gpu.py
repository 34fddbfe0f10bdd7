"""The zoo on a CUDA device: fp32 against fp64 on the CPU, bf16 autocast within tolerance, and the main command."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from bench import catalog
from mixers import Mixer
from tests.cli.conftest import TINY

pytestmark = pytest.mark.gpu

WIDTH, LENGTH, BATCH = 64, 100, 3


def zoo() -> list[tuple[str, dict]]:
    found = []
    for name in catalog.names("mixer"):
        target = catalog.load("mixer", name)
        if isinstance(target, type) and issubclass(target, Mixer):
            found += [(name, options) for options in target.variants if options.get("pattern", "causal_self") == "causal_self"]
    return found


def build(name: str, options: dict) -> Mixer:
    torch.manual_seed(0)
    return catalog.load("mixer", name)(WIDTH, **options)


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.double().cpu()
    return float((got.double().cpu() - want).square().mean().sqrt() / want.square().mean().sqrt())


def gradients(mixer: Mixer, x_BTD: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    y_BTD = mixer(x_BTD)[0]
    weights = torch.linspace(-1, 1, y_BTD.numel(), device=y_BTD.device, dtype=y_BTD.dtype).view_as(y_BTD)
    (y_BTD * weights).sum().backward()
    return y_BTD.detach(), {key: p.grad for key, p in mixer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "options"), zoo(), ids=str)
def test_gpu_equals_cpu(name: str, options: dict) -> None:
    exact = build(name, options).double()
    length = min(LENGTH, exact.caps.max_len or LENGTH)
    x_BTD = torch.randn(BATCH, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want, want_grads = gradients(exact, x_BTD)

    single = build(name, options).cuda()
    got, got_grads = gradients(single, x_BTD.float().cuda())
    assert rms_error(got, want) < 1e-4
    for key, grad in want_grads.items():
        if grad.square().mean().sqrt() > 1e-9:
            assert rms_error(got_grads[key], grad) < 2e-3, key

    half = build(name, options).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        rough, rough_grads = gradients(half, x_BTD.float().cuda())
    assert all(torch.isfinite(grad).all() for grad in rough_grads.values())
    if name not in {"block_topk", "hax"}:  # a rounded score may select another block or key
        assert rms_error(rough, want) < 5e-2


@pytest.mark.parametrize(("name", "options"), zoo(), ids=str)
def test_step_equals_forward(name: str, options: dict) -> None:
    mixer = build(name, options).cuda()
    x_BTD = torch.randn(BATCH, 40, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.no_grad():
        whole = mixer(x_BTD)[0]
        state = mixer.init_state(BATCH, 40, device="cuda")
        kept = copy.deepcopy(state)
        steps = []
        for t in range(40):
            y_BD, state = mixer.step(x_BTD[:, t], state)
            steps.append(y_BD)
    assert kept.keys() == state.keys()
    assert rms_error(torch.stack(steps, 1), whole) < 1e-3


def test_main_command_uses_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from bench.cli import app
    from bench.store import Store

    monkeypatch.chdir(tmp_path)
    arguments = [part for part in TINY if not part.startswith(("--device", "--jobs"))]
    result = CliRunner().invoke(app, ["synthetic", *arguments, "--mixer=attention,gla", "--seeds=1", "--no-report"])
    assert result.exit_code == 0, result.output
    records, _ = Store().load()
    assert {record.precision for record in records} == {"bf16"}
    assert all(record.device.startswith("cuda") and "gpu" in record.provenance.hardware for record in records)

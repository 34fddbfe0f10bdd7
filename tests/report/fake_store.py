"""A test fixture: a store of invented runs, deterministic, written through the real schema. No number in it was measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from bench import catalog, published
from bench.records import CellInfo, Metric, Provenance, RunRecord, StateInfo, Status
from bench.spec import SELECTION_SEED, LayerSpec, ModelSpec, RunSpec, TaskSpec, TrainSpec, digest, run_id
from bench.speed_records import Bound, GateResult, Peer, SpeedRecord, Timing
from bench.store import Store

CELLS = {"32x4": (32, 4), "64x8": (64, 8), "64x16": (64, 16)}
LRS = (1e-3, 1e-2)
SIZES = (64, 128)
# Mixer: bytes of state at width 64, its growth when the width doubles, bytes read (None: all), bits recalled per state bit.
MIXERS: dict[str, tuple[int, float, int | None, float]] = {
    "attention": (65536, 2, None, 1.0),
    "sliding_window": (8192, 2, None, 0.00065),
    "linear_attention": (17408, 4, None, 0.0004),
    "gla": (17408, 4, None, 0.0011),
    "delta_net": (18432, 4, None, 0.002),
    "mamba2": (9216, 2, None, 0.0014),
    "hyena": (32768, 2, 16384, 0.0003),
}


def spec(mixer: str, d_model: int = 64, lr: float = 1e-3, seed: int = 0, task: str = "mqar", **options: object) -> RunSpec:
    """A run's spec with the fixture's defaults."""
    layers = (LayerSpec(mixer="base_conv"), LayerSpec(mixer=mixer, options=options))
    return RunSpec(
        task=TaskSpec(name=task, options={"vocab_size": 256}),
        model=ModelSpec(layers=layers, d_model=d_model),
        train=TrainSpec(lr=lr, epochs=16),
        seed=seed,
    )


def record(
    run: RunSpec,
    *,
    test: float | None = 0.5,
    valid: float | None = None,
    loss: float | None = 1.0,
    status: Status = "done",
    reason: str = "",
    code: str = "a1",
    started: str = "2025-01-01T10:00:00Z",
    slices: dict[str, float] | None = None,
    state: tuple[int, int, int] = (4096, 4000, 4096),
    label: str | None = None,
) -> RunRecord:
    """A record with the fixture's defaults; without slices every cell has the mean's value."""
    last = run.model.layers[-1]
    metrics: list[Metric] = []
    if test is not None:
        cells = slices or dict.fromkeys(CELLS, test)
        metrics = [Metric(split="test", name="accuracy", slice="mean", value=test, n=3000)]
        metrics += [
            Metric(split="test", name="accuracy", slice=name, value=value, n=1000, stderr=0.01, stderr_kind="examples")
            for name, value in cells.items()
        ]
        metrics.append(Metric(split="valid", name="accuracy", slice="mean", value=test if valid is None else valid, n=3000))
        metrics.append(Metric(split="valid", name="loss", slice="mean", value=loss, n=3000))
    return RunRecord(
        run_id=run_id(run, code),
        spec=run,
        role=run.role,
        status=status,
        reason=reason,
        mixer=last.mixer,
        label=label or last.label(),
        parameters=41216 * (run.model.d_model // 64) ** 2,
        state=StateInfo(seq_len=64, dtype="float32", true_bytes=state[0], published_bytes=state[1], read_bytes=state[2]),
        cells=[_cell(name) for name in CELLS],
        metrics=metrics,
        device="cpu",
        precision="fp32",
        backend="torch",
        epochs_run=16,
        steps_run=640,
        started=started,
        train_seconds=6.0,
        wall_seconds=7.5,
        examples_per_second=4200.0 / (run.model.d_model / 64),
        peak_memory_bytes=500_000_000,
        provenance=Provenance(
            commit="0123456789abcdef0123456789abcdef01234567",
            dirty=False,
            diff_hash=None,
            code={f"mixer:{last.mixer}": code, "task:mqar": "c0de"},
            versions={"mixer-bench": "0.1.0", "torch": "2.11.0"},
            hardware={"cpu": "An invented CPU", "platform": "Linux", "threads": "2"},
            command="bench synthetic --task mqar",
        ),
    )


def _cell(name: str) -> CellInfo:
    length, pairs = CELLS[name]
    ceilings = {"chance": 1 / 128, "in-context guess": 1 / pairs}
    bits = math.log2(math.comb(127, pairs)) + math.log2(math.perm(128, pairs))
    return CellInfo(name=name, axes={"length": length, "pairs": pairs}, ceilings=ceilings, bits_needed=bits)


def build(root: Path, *, report_seeds: int = 3, task: str = "mqar", minute: int = 0) -> Store:
    """Writes seven mixers at two sizes: two learning rates on one selection seed, then the reported seeds.

    One selection run has diverged, one reported run is out of memory, and Hyena has one reported seed only.
    """
    store = Store(root)
    for mixer, (base, growth, read, efficiency) in MIXERS.items():
        for size, d_model in enumerate(SIZES):
            true = int(base * growth**size)
            state = (true, int(true * 0.94), int((read or base) * growth**size))
            accuracy = {name: _accuracy(true, name, efficiency) for name in CELLS}
            trials = [(lr, SELECTION_SEED) for lr in LRS]
            trials += [(LRS[0], seed) for seed in range(1 if mixer == "hyena" else report_seeds)]
            for lr, seed in trials:
                run = spec(mixer, d_model, lr, seed, task)
                started = f"2025-01-01T10:{minute:02d}:{seed % 60:02d}Z"
                store_run(store, run, accuracy, state, started)
    return store


def _accuracy(state_bytes: int, cell: str, efficiency: float) -> float:
    """An invented law: a state recalls `efficiency` of its bits, the rest is guessed."""
    info = _cell(cell)
    share = 1 - math.exp(-1.5 * efficiency * state_bytes * 8 / info.bits_needed)
    guess = info.ceilings["in-context guess"]
    return guess + (1 - guess) * share


def store_run(store: Store, run: RunSpec, accuracy: dict[str, float], state: tuple[int, int, int], started: str) -> None:
    """Writes one run with noise, curve and influence map that its spec decides."""
    mixer = run.model.layers[-1].mixer
    rng = np.random.default_rng([*mixer.encode(), run.model.d_model, run.seed, int(run.train.lr * 1e4)])
    if (mixer, run.train.lr, run.model.d_model) == ("linear_attention", LRS[1], 128):
        reason = "The validation loss became NaN after epoch 3; a smaller learning rate usually helps."
        store.write(record(run, test=None, status="diverged", reason=reason, state=state, started=started))
        return
    if (mixer, run.seed, run.model.d_model) == ("gla", 2, 128):
        reason = "Out of memory at batch size 256 and again at 128; lower it with --set train.batch_size=64."
        store.write(record(run, test=None, status="oom", reason=reason, state=state, started=started))
        return
    worse = 0.7 if run.train.lr == LRS[1] else 1.0
    noisy = {name: float(np.clip(worse * value + rng.normal(0, 0.015), 0, 1)) for name, value in accuracy.items()}
    mean = float(np.mean(list(noisy.values())))
    made = record(run, test=mean, valid=min(1.0, mean + 0.004), slices=noisy, state=state, started=started)
    influence = _influence(mixer, rng) if run.role == "report" and run.seed == 0 else None
    store.write(made, _curve(mean, rng), influence)


def _curve(final: float, rng: np.random.Generator) -> list[dict[str, float | int | None]]:
    rows: list[dict[str, float | int | None]] = []
    for epoch in range(1, 17):
        value = final * (1 - math.exp(-((epoch / 5) ** 2))) + rng.normal(0, 0.01)
        row: dict[str, float | int | None] = {"epoch": epoch, "step": epoch * 40, "examples": epoch * 10240, "lr": 1e-3}
        row |= {"train_loss": 5 - 4 * value, "train_accuracy": value, "valid_loss": 5 - 4 * value}
        rows.append(row | {"valid_accuracy": min(1.0, max(0.0, value)), "seconds": epoch * 0.4})
    return rows


def _influence(mixer: str, rng: np.random.Generator, length: int = 64, pairs: int = 16) -> dict[str, np.ndarray]:
    """A map with a recency profile and, as far as the mixer is good at it, weight on each query's pair."""
    keys = np.arange(pairs) * 2
    queries = np.sort(rng.choice(np.arange(2 * pairs, length), size=pairs, replace=False))
    order = rng.permutation(pairs)
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    reach = {"sliding_window": 4, "attention": 40}.get(mixer, 15)
    weights = np.exp(-distance / reach) * rng.uniform(0.3, 1, (length, length)) * (distance >= 0)
    strength = {"attention": 30, "delta_net": 8, "gla": 4, "mamba2": 5}.get(mixer, 0.5)
    for query, pair in zip(queries, order, strict=True):
        weights[query, keys[pair] + 1] += strength
        weights[query, keys[pair]] += strength / 4
    return {
        "map": weights.astype(np.float32),
        "tokens": rng.integers(1, 256, length),
        "query_positions": queries,
        "key_positions": keys[order],
        "value_positions": keys[order] + 1,
    }


def reproduce(root: Path, recipe: str, *, left_out: str = "hyena", off: dict[str, float] | None = None) -> Store:
    """Writes a recipe's runs at two of its rates with the published values plus noise; `off` shifts targets by name.

    The mixer `left_out` has no runs. Three reported seeds, two selection seeds that were tested too.
    """
    store = Store(root)
    sweep = catalog.load("recipe", recipe)()
    for target in published.load(recipe).targets:
        for experiment in filter(target.fits, sweep.experiments):
            if experiment.model.mixer() == left_out:
                continue
            rng = np.random.default_rng([*target.point.encode(), experiment.model.d_model])
            value = target.value + (off or {}).get(target.point, 0.0)
            trials = [(lr, SELECTION_SEED + seed) for lr in experiment.lrs[:2] for seed in range(2)]
            for lr, seed in trials + [(experiment.lrs[0], seed) for seed in range(3)]:
                scatter = rng.normal(-0.1 * (lr != experiment.lrs[0]), 0.002)
                test = float(np.clip(value + scatter, 0, 1))
                size = target.state_bytes or 1000
                made = record(experiment.run(lr, seed), test=test, state=(size + 512, size, size), label=experiment.model.label())
                store.write(made.model_copy(update={"mixer": experiment.model.mixer()}))
    return store


def speed(
    mixer: str, mode: str, *, length: int = 256, d_model: int = 64, microseconds: float | None = 800.0, kind: str = "mixer"
) -> SpeedRecord:
    """An invented row of `bench throughput`; without a time its gate is red."""
    timing = (
        None if microseconds is None else Timing(median_us=microseconds, low_us=0.9 * microseconds, high_us=1.2 * microseconds, n=7)
    )
    width = {"d_model": d_model} if kind == "mixer" else {"heads": 2, "groups": 2, "key": 32, "value": 32}
    peer = Peer(name="a public one", version="1.0", eager=Timing(median_us=2000.0, low_us=1900.0, high_us=2100.0, n=7))
    return SpeedRecord(
        speed_id=digest([kind, mixer, mode, length, d_model]),
        subject=kind,  # type: ignore[arg-type]
        name=mixer,
        mode=mode,  # type: ignore[arg-type]
        shape={"batch": 512 // length, "length": length, **width},
        dtype="fp32",
        path="chunked",
        status="wrong" if timing is None else "done",
        reason="o is off by 1.0e+00 of its size; 1e-03 is allowed." if timing is None else "",
        gate=GateResult(passed=timing is not None, against="an invented definition", worst="o", error=1e-6, tolerance=1e-3),
        bound=Bound(bytes=1 << 20, flops=1 << 20, microseconds=131.0, by="bytes"),
        eager=timing,
        tokens_per_second=None if microseconds is None else 512 / microseconds * 1e6,
        first_call_seconds=0.5,
        state_bytes=17408,
        peers=[peer] if kind == "kernel" else [],
        copy_bytes_per_second=8e9,
        product_flops_per_second=3e10,
        product_dtype="float32",
        device="cpu",
        started="2025-01-01T11:00:00Z",
        provenance=record(spec("gla")).provenance,
    )


def measure(store: Store) -> Store:
    """Adds speeds: every mixer at both widths and three lengths but for Hyena at the larger one, two kernels, a red gate."""
    for index, mixer in enumerate(MIXERS):
        for d_model in SIZES:
            for length in (128, 256, 512):
                slower = (length / 128) ** (1.0 if mixer == "attention" else 0.1) * (1 + index / 3) * d_model / 64
                for mode, share in (("train", 3.0), ("forward", 1.0), ("prefill", 1.1), ("decode", 0.05)):
                    if (mixer, d_model) != ("hyena", 128):
                        store.write_speed(speed(mixer, mode, length=length, d_model=d_model, microseconds=500 * share * slower))
    for length in (128, 512):
        store.write_speed(speed("delta", "train", length=length, kind="kernel"))
        store.write_speed(speed("kda", "train", length=length, kind="kernel", microseconds=None))
    return store

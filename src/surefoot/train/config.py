"""What a run is: every option of `surefoot train`, its checks and its defaults."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from surefoot.errors import InputError

OPTIMIZERS = ("delta-gclip", "gclip", "normalized-gd", "smooth-clip", "sgd", "adam", "adamw")

# The letters each optimizer takes and their defaults; None means "off unless given" (γ switches on `clip_grad_`).
# η = 1 and γ = 0.25, or what corresponds to them: β = γ, lr = η γ for normalized GD; L0 = 1/η, L1 = L0/γ.
LETTERS: dict[str, dict[str, float | None]] = {
    "delta-gclip": {"lr": 1.0, "gamma": 0.25, "delta": 0.01, "momentum": 0.0},
    "gclip": {"lr": 1.0, "gamma": 0.25, "momentum": 0.0},
    "normalized-gd": {"lr": 0.25, "beta": 0.25, "momentum": 0.0},
    "smooth-clip": {"lr": 1.0, "L0": 1.0, "L1": 4.0, "momentum": 0.0},
    "sgd": {"lr": 0.1, "gamma": None, "delta": None, "momentum": 0.0},
    "adam": {"lr": 1e-3, "gamma": None, "delta": None},
    "adamw": {"lr": 1e-3, "gamma": None, "delta": None},
}

# For each letter: lowest and highest value, whether the lowest itself is excluded.
RANGES: dict[str, tuple[float, float, bool]] = {
    "lr": (0.0, math.inf, True),
    "gamma": (0.0, math.inf, True),
    "delta": (0.0, 1.0, False),
    "beta": (0.0, math.inf, False),
    "L0": (0.0, math.inf, True),
    "L1": (0.0, math.inf, False),
    "momentum": (0.0, 1.0, False),
    "weight_decay": (0.0, math.inf, False),
}


@dataclass(frozen=True)
class TrainConfig:
    """Train on a data set or your own model; write a run folder with report.html."""

    data: str = "digits"
    """digits, a Hugging Face hub id, a folder of parquet files or images, a .csv or a .txt file."""
    target: str | None = None
    """The column of a CSV (or numeric parquet) to predict; several separated by commas."""
    task: Literal["auto", "classification", "regression"] = "auto"
    """What a table's target is, where its values leave that open."""
    image_size: int | None = None
    """Resize images to this many pixels a side."""
    context: int = 128
    """Characters in a window of text, and the most words of a sentence."""
    test_fraction: float | None = None
    """The part held out where the data has no test split (0.2; 0.1 for text)."""
    limit: int | None = None
    """Train on this many rows only."""

    model: str = "mlp"
    """mlp, resnet20, resnet18, vit-tiny, lstm, gpt, vae or path/to/file.py:factory."""
    width: tuple[int, ...] | None = None
    """Units in each hidden layer: one number for all, or one a layer."""
    depth: int | None = None
    """Number of hidden layers."""
    activation: str | None = None
    """relu, tanh, sigmoid, softplus, gelu, silu, elu, leaky-relu or identity."""

    loss: Literal["auto", "mse", "cross-entropy"] = "auto"
    """mse is torch's mean over rows and outputs (one-hot targets for classes); auto: cross-entropy for classes."""
    optimizer: str = "delta-gclip"
    """delta-gclip, gclip, normalized-gd, smooth-clip, sgd, adam or adamw (these three clip when --gamma is given)."""
    lr: float | None = None
    """η, the step size."""
    gamma: float | None = None
    """γ, the threshold on the gradient norm."""
    delta: float | None = None
    """δ in [0, 1], the floor of the multiplier."""
    beta: float | None = None
    """β of normalized-gd: h = lr / (||g|| + β)."""
    L0: float | None = None
    """L0 of smooth-clip: h = lr / (L0 + L1 ||g||)."""
    L1: float | None = None
    """L1 of smooth-clip."""
    momentum: float | None = None
    """μ in [0, 1]."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = 0.0
    """λ; decoupled for adamw, added to the gradient otherwise."""
    nonfinite: Literal["skip", "raise", "propagate"] = "skip"
    """What to do with a step whose gradient norm is NaN or infinite."""
    lr_schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    """linear and cosine fall to 0; step multiplies by 0.1 at one half and at three quarters of the steps."""
    warmup: int = 0
    """Steps over which lr rises linearly from 0."""

    batch_size: int | Literal["full"] = 64
    """Rows a step; full is deterministic descent, which the theorems speak of."""
    micro_batch: int | None = None
    """Rows in memory at once: a larger batch is gone through in pieces, their gradients added up."""
    epochs: float | None = None
    """Passes over the training rows (10 unless --steps is given)."""
    steps: int | None = None
    """Number of steps, in place of --epochs."""
    seed: int = 0
    """Fixes initialisation, data order and the draws of training; the rows held out are the same for all seeds."""
    eval_every: int | None = None
    """Steps between evaluations (an epoch, and at most a hundred evaluations)."""
    checkpoint_seconds: float = 30.0
    """Seconds between checkpoints."""
    probe_smoothness: int | None = None
    """Measure the smoothness along every EVERY-th step: seven extra gradients each, and the same weights."""
    until_certified: bool = False
    """Try for a certificate along the way, and stop once there is one; exit code 1 if there is none at the end."""
    check_certificate: bool = False
    """After the certificate take the steps it covers to the end, and stop with exit code 1 should one contradict it."""
    from_certificate: str | None = None
    """Begin at the weights of the certificate in this folder, on its rows, and hold every step against it."""
    explore_exploit: bool = False
    """Train everything for a part of the steps, then freeze all but the last layer and finish it under a verdict."""
    tau: float | None = None
    """The part of the steps that explores, in [0, 1) (0.6)."""
    noise: float | Literal["auto"] | None = None
    """Standard deviation of what is added to each hidden weight before they are frozen, 0 for none (auto)."""
    solver: Literal["gd", "delta-gclip", "sgd", "direct", "newton-cg"] | None = None
    """Of the last layer: gd and delta-gclip under a bound at each step, direct to the end at once (gd)."""
    widen: int | Literal["auto"] | None = None
    """Put a hidden layer of so many units in front of the last one; auto: twice the rows, where it is too narrow."""
    head: str | None = None
    """The name of the last linear layer (found)."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of data, weights and arithmetic."""
    autocast: Literal["none", "bf16"] = "none"
    """bf16 works out products in bfloat16; weights and steps stay in --dtype."""
    threads: int | None = None
    """Threads of the CPU (torch's choice); results are repeated bit for bit at the same number."""
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    """Under torchrun: ddp (what none means with several processes) copies the model, fsdp cuts it up."""

    def resolved(self) -> TrainConfig:
        """Return the configuration with every default filled in, or raise InputError on an option out of range.

        Doing it twice changes nothing.
        """
        if self.optimizer not in OPTIMIZERS:
            raise InputError(unknown("--optimizer", self.optimizer, OPTIMIZERS))
        letters = LETTERS[self.optimizer]
        filled: dict[str, Any] = {}
        for name in ("lr", "gamma", "delta", "beta", "L0", "L1", "momentum"):
            value = getattr(self, name)
            if value is not None and name not in letters:
                takers = [o for o in OPTIMIZERS if name in LETTERS[o]]
                raise InputError(
                    f"{flag(name)} {value:g} has no effect with --optimizer {self.optimizer}; leave it out, or use "
                    f"{' or '.join(takers)}"
                )
            filled[name] = letters.get(name) if value is None else float(value)
        for name, value in [*filled.items(), ("weight_decay", self.weight_decay)]:
            if value is not None:
                check_range(name, value)
        if self.delta is not None and filled["gamma"] is None:
            raise InputError(f"--delta {self.delta:g} has no effect without --gamma; give both")
        if self.nesterov and not filled["momentum"]:
            raise InputError("--nesterov has no effect without --momentum; give for example --momentum 0.9")
        if self.epochs is not None and self.steps is not None:
            raise InputError(f"--epochs {self.epochs:g} and --steps {self.steps} contradict each other; give one")
        if self.epochs is None and self.steps is None:
            filled["epochs"] = 10.0
        for name in ("steps", "batch_size", "micro_batch", "eval_every", "probe_smoothness", "threads"):
            value = getattr(self, name)
            if value is not None and value != "full" and value < 1:
                raise InputError(f"{flag(name)} {value} is too small; give at least 1")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"--epochs {self.epochs:g} is not a positive number; give for example --epochs 3")
        if self.probe_smoothness is not None and self.parallel == "fsdp":
            raise InputError(
                f"--probe-smoothness {self.probe_smoothness} needs whole parameters, and --parallel fsdp cuts them up; "
                "use --parallel ddp"
            )
        filled |= self._explore_exploit()
        if self.warmup < 0:
            raise InputError(f"--warmup {self.warmup} is negative; give a number of steps, 0 for none")
        if not self.checkpoint_seconds > 0:
            raise InputError(f"--checkpoint-seconds {self.checkpoint_seconds:g} is not positive")
        if self.autocast != "none" and self.dtype == "float64":
            raise InputError(f"--autocast {self.autocast} and --dtype float64 contradict each other; give one")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed} is outside [0, 2^63)")
        return dataclasses.replace(self, **filled)

    def _explore_exploit(self) -> dict[str, Any]:
        """Check the options of --explore-exploit and return their defaults; nothing where it is not asked for."""
        for name in ("tau", "noise", "solver", "widen", "head"):
            value = getattr(self, name)
            if value is not None and not self.explore_exploit:
                raise InputError(f"{flag(name)} {value} has no effect without --explore-exploit; give both, or neither")
        if not self.explore_exploit:
            return {}
        for name, why in (
            ("until_certified", "each ends the run in its own way"),
            ("from_certificate", "one freezes the hidden layers, the other is about all weights"),
            ("check_certificate", "one freezes the hidden layers, the other is about all weights"),
        ):
            if getattr(self, name):
                raise InputError(f"--explore-exploit and {flag(name)} contradict each other: {why}; give one")
        if self.parallel != "none":
            raise InputError(f"--explore-exploit runs in one process; leave --parallel {self.parallel} out")
        tau, noise = 0.6 if self.tau is None else float(self.tau), "auto" if self.noise is None else self.noise
        if not 0 <= tau < 1:
            raise InputError(
                f"--tau {tau:g} is outside [0, 1); 0.6 explores for six tenths of the steps, 0 freezes the features as "
                "they are at first"
            )
        if noise != "auto" and not 0 <= noise < math.inf:
            raise InputError(f"--noise {noise:g} is outside [0, infinity); 0 adds none, auto chooses")
        if self.widen is not None and self.widen != "auto" and self.widen < 1:
            raise InputError(f"--widen {self.widen} is too small; give a number of units, or auto")
        return {"tau": tau, "noise": noise, "solver": self.solver or "gd"}

    def to_json(self) -> dict[str, Any]:
        """Return the options as a flat JSON object; infinity as the string "inf"."""
        return {k: plain(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, options: dict[str, Any], *, source: str) -> TrainConfig:
        """Read what `to_json` gave; `source` is named in errors."""
        names = {f.name for f in dataclasses.fields(cls)}
        for name in options:
            if name not in names:
                raise InputError(f"{source}: {unknown('option', name, sorted(names))}")
        values: dict[str, Any] = {k: math.inf if v == "inf" else v for k, v in options.items()}
        if isinstance(values.get("width"), list):
            values["width"] = tuple(values["width"])
        hints = get_type_hints(cls)
        for name, value in values.items():
            if not _fits(value, hints[name]):
                raise InputError(f"{source}: {name} = {value!r} is no {hints[name]}")
        return cls(**values)


def flag(name: str) -> str:
    """Return the command line's spelling of an option: weight_decay is --weight-decay."""
    return "--" + name.replace("_", "-")


def check_range(name: str, value: float) -> None:
    """Raise InputError unless `value` lies in the range of the letter `name`."""
    low, high, open_low = RANGES[name]
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or (math.isinf(value) and name != "gamma"):
        left = f"({low:g}" if open_low else f"[{low:g}"
        right = "infinity)" if high == math.inf else f"{high:g}]"
        hint = {
            "gamma": "; --gamma inf never clips",
            "delta": "; 0 is plain clipping, 1 plain gradient descent",
            "lr": "; try a tenth of what you would give SGD if you are unsure",
        }.get(name, "")
        raise InputError(f"{flag(name)} {value:g} is outside {left}, {right}{hint}")


def unknown(what: str, value: str, choices: tuple[str, ...] | list[str]) -> str:
    """Return the message for a word that is none of `choices`, with the closest one."""
    close = difflib.get_close_matches(value, choices, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return f"{what} {value!r} is not known{meant}; choose from {', '.join(choices)}"


def plain(value: Any) -> Any:
    """Return a value that strict JSON can hold."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return list(value) if isinstance(value, tuple) else value


def read_config(path: Path, cls: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Read a config.json, or raise InputError."""
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"--config {path} cannot be read as JSON: {error}") from error
    if not isinstance(options, dict):
        raise InputError(f"--config {path} holds a {type(options).__name__}, not a JSON object of options")
    return cls.from_json(options, source=f"--config {path}")


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a value read from JSON is of an option's type."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)

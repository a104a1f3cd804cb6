"""δ-GClip beside SGD, plain clipping and Adam on the kinds of networks of the paper: each tuned, then seed by seed.

Letters: η lr, γ gamma, δ delta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from surefoot.data import Dataset
from surefoot.errors import InputError
from surefoot.reproduce.figures import MUTED, differences
from surefoot.reproduce.recipe import Arms, Column, Drawing, Experiment, Finding, Job, Recipe, Setting, Table
from surefoot.reproduce.recipes.delta_gclip_parity import PAPER
from surefoot.reproduce.results import Results
from surefoot.reproduce.trials import Rule, Task, tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, RIVALS = "δ-GClip", ("SGD", "GClip", "Adam(W)")
TOLERANCE = 0.01


class SentenceClassifier(nn.Module):
    """Token ids (N, T), 0 for padding -> logits (N, outputs): DistilBERT, the mean over the tokens, a linear layer.

    Args:
        vocabulary_size: different ids.
        length: the longest T.
        outputs: classes.
        width: features of a token.
        depth: blocks.
        pretrained: a hub id or folder of any such encoder, in place of random weights; it has its own width and
            depth.

    Raises:
        InputError: transformers is missing, or `pretrained` cannot be loaded.
    """

    def __init__(
        self, vocabulary_size: int, length: int, outputs: int, *, width: int = 0, depth: int = 0, pretrained: str = ""
    ) -> None:
        super().__init__()
        if pretrained:
            self.body: nn.Module = _loaded("AutoModel", pretrained)
            width = int(self.body.config.hidden_size)  # type: ignore[union-attr, arg-type]
        else:
            self.body = _distilbert(vocabulary_size, length, width, depth)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        real = tokens != 0
        states = self.body(input_ids=tokens, attention_mask=real.long()).last_hidden_state  # (N, T, width)
        weight = real.unsqueeze(-1) / real.sum(1)[:, None, None]
        return self.head((states * weight).sum(1))


def _distilbert(vocabulary_size: int, length: int, width: int, depth: int) -> nn.Module:
    transformers = _transformers()
    settings: dict[str, Any] = {
        "vocab_size": vocabulary_size, "max_position_embeddings": length, "dim": width, "hidden_dim": 4 * width,
        "n_layers": depth, "n_heads": max(1, width // 16), "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return transformers.DistilBertModel(transformers.DistilBertConfig(**settings))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as missing:
        raise InputError("reproduce: transformers is not installed; pip install 'surefoot[transformers]'") from missing
    return transformers


def _loaded(what: str, name: str) -> Any:
    """Return a pre-trained model ("AutoModel") or its tokenizer ("AutoTokenizer")."""
    try:
        return getattr(_transformers(), what).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"pretrained={name!r} cannot be loaded; give a hub id that can be reached or a folder that "
            "save_pretrained() wrote"
        ) from error


def retokenized(data: Dataset, pretrained: str) -> Dataset:
    """Return sentences as the ids of a pre-trained model's tokenizer, as long as they were; 0 is padding.

    Raises:
        InputError: the tokenizer cannot be loaded, or its padding has another id than 0.
    """
    tokenizer = _loaded("AutoTokenizer", pretrained)
    if tokenizer.pad_token_id != 0:
        raise InputError(
            f"pretrained={pretrained!r} pads with id {tokenizer.pad_token_id}; give a model that pads with 0, such as "
            "distilbert-base-uncased"
        )
    words = data.vocabulary
    assert words is not None

    def ids(rows: Tensor) -> Tensor:
        texts = [" ".join(tokenizer.unk_token if i == 1 else words[i] for i in row if i) for row in rows.tolist()]
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=rows.shape[1], return_tensors="pt")
        return found["input_ids"]

    return dataclasses.replace(data, train_x=ids(data.train_x), test_x=ids(data.test_x))


def run(job: Job) -> Arms:
    """Tune each optimizer with seed 0 where it has a grid, then train with seed job.seed + 1."""
    assert job.data is not None
    task = make_task(job)
    rules = tuned(job, task, {name: _grid(**letters) for name, letters in job.experiment.setting["rules"].items()})
    found = {}
    for name, rule in rules.items():
        found[name] = task.trial(rule, job.seed + 1, on_test=True)
        job.progress(name)
    return found


def make_task(job: Job) -> Task:
    """Return the task of a job: one of surefoot's models, or the sentence classifier."""
    assert job.data is not None
    s, data = job.experiment.setting, job.data
    if s["model"] != "distilbert":
        return Task(data, s, job.device)
    if "pretrained" in s["network"]:
        data = retokenized(data, s["network"]["pretrained"])
    assert data.vocabulary is not None
    shape = len(data.vocabulary), data.input_shape[0], data.outputs
    return Task(data, s, job.device, lambda: SentenceClassifier(*shape, **s["network"]))


def _grid(lr: list[float], gamma: list[float] | None = None, **rest: Any) -> list[Rule]:
    if gamma is None:
        return [Rule(a, **rest) for a in lr]
    return [Rule(a, b, **rest) for a, b in product(lr, gamma)]


def judge(results: Results) -> list[Finding]:
    """Compare δ-GClip with each rival."""
    return [found for e in results.experiments for rival in RIVALS for found in _compared(results, e.name, rival)]


def _compared(results: Results, name: str, rival: str) -> Iterator[Finding]:
    d, floored = results.difference(name, OURS, rival, "score"), results.summary(name, OURS, "floored")
    if d is None or floored is None:
        return
    what, said = f"{name}: {OURS} beside {rival}", f"{100 * d.mean:+.3g} points"
    if rival == "GClip" and floored.mean == 0 == d.mean and not d.error:
        yield Finding(what, "not testable here", "the floor was never reached: the two are the same runs")
        return
    if d.error is None:
        yield Finding(what, "not testable here", f"{said}; one seed has no standard error")
        return
    said += f", standard error {100 * d.error:.2g}, {d.n} seeds"
    if d.error > TOLERANCE:
        yield Finding(what, "not testable here", f"{said}: too much noise between seeds")
        return
    fits = d.mean >= -max(TOLERANCE, 2 * d.error)
    yield Finding(what, "reproduced" if fits else "not reproduced", said)


def _paint(figure: Figure, results: Results) -> None:
    axes = figure.add_subplot()
    differences(axes, results, arms=RIVALS, base=OURS, measures=("score",), tolerance=TOLERANCE)
    axes.set_xlabel("points above δ-GClip (left: δ-GClip is better)", color=MUTED)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)


CIFAR: Any = {"data": "uoft-cs/cifar10", "local": ("cifar10", "cifar10_10k2k")}
FASHION: Any = {"data": "zalando-datasets/fashion_mnist", "local": ("fashion_mnist",)}
SST2: Any = {"data": "stanfordnlp/sst2", "local": ("sst2",)}
CLASSES = {"loss": "cross-entropy", "score": "accuracy", "schedule": "constant", "test": 0}
ELBO = {"loss": "elbo", "score": "elbo", "schedule": "constant", "test": 0}


def _rules(lr: list[float], gamma: list[float], delta: float, sgd: list[float], adam: dict[str, Any]) -> dict[str, Any]:
    clipped = {"lr": lr, "gamma": gamma}
    return {"SGD": {"lr": sgd}, "GClip": clipped, OURS: {**clipped, "delta": delta}, "Adam(W)": adam}


SMALL = (
    Experiment(
        "resnet18", **CIFAR, options={"image_size": 16},
        setting={
            **CLASSES, "model": "resnet18", "network": {"width": [4]}, "batch": 64, "steps": 150, "valid": 1000,
            "schedule": "step",
            "rules": _rules([0.1, 0.3, 1.0, 3.0], [0.1, 0.3, 1.0], 1e-3, [0.03, 0.1, 0.3, 1.0],
                            {"name": "adam", "lr": [1e-3, 3e-3, 1e-2]}),
        },
    ),
    Experiment(
        "vae", **FASHION, options={"limit": 5000},
        setting={
            **ELBO, "model": "vae", "network": {"width": [50, 50], "latent": 50}, "batch": 100, "steps": 300,
            "valid": 1000,
            "rules": _rules([1e-3, 3e-3, 1e-2, 3e-2], [20.0, 60.0, 200.0], 0.1, [1e-3, 3e-3, 1e-2],
                            {"name": "adam", "lr": [1e-3, 3e-3, 1e-2]}),
        },
    ),
    Experiment(
        "vit", **CIFAR, options={"image_size": 16},
        setting={
            **CLASSES, "model": "vit-tiny", "network": {"width": [32], "depth": 2}, "batch": 32, "steps": 250,
            "valid": 1000,
            "rules": _rules([0.03, 0.1, 0.3, 1.0], [0.3, 1.0, 3.0], 1e-3, [0.03, 0.1, 0.3],
                            {"name": "adam", "lr": [3e-4, 1e-3, 3e-3]}),
        },
    ),
    Experiment(
        "distilbert", **SST2, options={"limit": 6000, "context": 24},
        setting={
            **CLASSES, "model": "distilbert", "network": {"width": 32, "depth": 2}, "batch": 32, "steps": 250,
            "valid": 1000,
            "rules": _rules([0.03, 0.1, 0.3, 1.0], [0.2, 0.6, 2.0], 1e-3, [0.03, 0.1, 0.3],
                            {"name": "adamw", "lr": [1e-3, 3e-3, 1e-2]}),
        },
    ),
)  # fmt: skip
FULL = (
    Experiment(
        "resnet18", "uoft-cs/cifar10", ("cifar10",),
        setting={
            **CLASSES, "model": "resnet18", "network": {}, "batch": 512, "epochs": 200, "valid": 0, "schedule": "step",
            "rules": _rules([5.0], [0.25], 1e-3, [1.0], {"name": "adam", "lr": [1e-4]}),
        },
    ),
    Experiment(
        "vae", **FASHION,
        setting={
            **ELBO, "model": "vae", "network": {"width": [50, 50], "latent": 50}, "batch": 100, "epochs": 200,
            "valid": 0, "rules": _rules([1e-3], [200.0], 0.1, [1e-4], {"name": "adam", "lr": [1e-3]}),
        },
    ),
    Experiment(
        "vit", "uoft-cs/cifar10", ("cifar10",), options={"image_size": 64},
        setting={
            **CLASSES, "model": "vit-tiny", "network": {}, "batch": 64, "epochs": 100, "valid": 0,
            "rules": _rules([0.2], [1.0], 1e-3, [0.1], {"name": "adam", "lr": [5e-4], "weight_decay": 1e-5}),
        },
    ),
    Experiment(
        "distilbert", **SST2, options={"context": 64},
        setting={
            **CLASSES, "model": "distilbert", "network": {"pretrained": "distilbert-base-uncased"}, "batch": 32,
            "epochs": 3, "valid": 2000,
            "rules": _rules([0.01, 0.03, 0.1], [0.3, 1.0, 3.0], 1e-3, [0.01, 0.03, 0.1],
                            {"name": "adamw", "lr": [1e-5, 3e-5, 1e-4]}),
        },
    ),
)  # fmt: skip

RECIPE = Recipe(
    name="delta-gclip-table",
    folder="delta-gclip",
    paper=PAPER,
    claim="δ-GClip is competitive with SGD, plain clipping (GClip) and Adam on a ResNet, a VAE, a vision "
    "transformer and a DistilBERT.",
    scaled="the same kinds of networks, narrow, on 9,000 images of 16x16, 4,000 images and 5,000 sentences, for 150 "
    "to 300 steps: a run takes a second or two. All are tuned; DistilBERT has random weights.",
    tolerance="For each network and each of SGD, GClip and Adam(W): the mean over the seeds of the test score of "
    "δ-GClip minus that of the other, paired by seed, is at least -1 point of accuracy (VAE: -0.01 of the share of "
    "a constant's loss that is gone), or at least -2 of its standard errors. Where that standard error is above 1 "
    "point it is not testable here. Where the floor was never reached and δ-GClip and GClip are the same runs, δ "
    "was not tested: not testable here.",
    settings=(
        Setting("η, γ", "the best of a grid (3 or 4 η, 3 γ) by the validation score of seed 0, for each optimizer by "
                "itself; wider where the best is at an end", "ours: the paper's values are for other sizes",
                full="the values of the authors' public code; DistilBERT: tuned"),
        Setting("δ", "1e-3; VAE 0.1; DistilBERT 1e-3", "authors' code (ResNet 1e-3 or 1e-8, ViT 1e-3, VAE 0.1); "
                "DistilBERT: ours"),
        Setting("ResNet-18", "4 channels, 16x16, batch 64, 150 steps, lr x 0.1 at half and at three quarters, for all "
                "optimizers", "schedule, full size: authors' code",
                full="64 channels, 32x32, batch 512, 200 epochs; SGD η 1; δ-GClip and GClip η 5, γ 0.25; Adam 1e-4"),
        Setting("VAE", "784-50-50-(50, 50), batch 100, 300 steps, normal decoder", "layers, batch: authors' code; "
                "decoder, and the loss as a mean over rows: ours. In their code a decay of η meant for all reached the "
                "clipped methods only: left out",
                full="200 epochs; Adam 1e-3, SGD 1e-4, δ-GClip and GClip 1e-3, γ 200"),
        Setting("ViT", "2 blocks of 32, 16x16, batch 32, 250 steps", "full size: authors' code and logs (SGD: its best "
                "in their hyper-parameter logs; GClip: as δ-GClip)",
                full="ViT-Tiny, 64x64, patch 16, batch 64, 100 epochs; δ-GClip and GClip η 0.2, γ 1; SGD η 0.1; Adam "
                "5e-4, decay 1e-5"),
        Setting("DistilBERT", "2 blocks of 32, random weights, SST-2, 24 words, batch 32, 250 steps, mean over tokens",
                "ours: SST-2 in place of the paper's sentences; its settings are not known",
                full="distilbert-base-uncased, pre-trained, 64 tokens, 3 epochs"),
        Setting("weight decay, momentum, warm-up, augmentation", "none, for all optimizers", "ours: equal for all",
                full="ViT: Adam's decay of 1e-5, as in the authors' code; else none"),
        Setting("seeds", "1, 2, ...; 0 is for tuning alone; the same for all optimizers", "ours"),
        Setting("test metric", "the mean over all test rows", "ours: the public code divides by one batch too many"),
    ),
    experiments=SMALL,
    full=FULL,
    run=run,
    judge=judge,
    tables=(
        Table("Test scores (accuracy; VAE: share of a constant's loss that is gone)", (
            Column("score", "score", ".4f"),
            Column("loss", "test loss", ".4g"),
            Column("diverged", "diverged", ".0%"),
            Column("lr", "η"),
            Column("gamma", "γ"),
            Column("delta", "δ"),
            Column("clipped", "clipped", ".1%"),
            Column("floored", "on the floor", ".1%"),
            Column("median norm", "median norm", ".3g"),
        ), (OURS, *RIVALS)),
    ),
    drawings=(
        Drawing("table", "Test score of each rival minus that of δ-GClip, seed by seed (faint), their mean and two "
                "standard errors; grey: the tolerance of one point.", _paint, (8.0, 4.2)),
    ),
    seeds=5,
)  # fmt: skip

"""Lightning with our optimizers: telemetry in its loggers, mixed precision, nobody clips twice."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations_helpers import need, rows, small, weights
from torch.utils.data import DataLoader

from surefoot import DeltaGClip, GClip
from surefoot.errors import InputError

pl = need("lightning.pytorch")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from surefoot.integrations.lightning import TelemetryCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*:FutureWarning"),
]
KEYS = {"grad_norm/preclip", "grad_norm/postclip", "clip_coef", "clip_fraction", "floor_fraction", "skipped"}


class Module(pl.LightningModule):
    def __init__(
        self, optimizer: type[torch.optim.Optimizer] = DeltaGClip, warm_up: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.net = small()
        self.kind, self.warm_up = optimizer, warm_up
        self.options = {"lr": 0.05, "gamma": 1.0, "delta": 0.2, "momentum": 0.9, **options}
        self.lrs: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(**batch)["loss"]
        self.log("train_loss", loss)
        self.lrs.append(self.optimizers().param_groups[0]["lr"])
        return loss

    def configure_optimizers(self) -> Any:
        opt = self.kind(self.parameters(), **self.options)
        if not self.warm_up:
            return opt
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, step / 4))
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, module: Any = None, *, callbacks: Any = None, checkpoint: Any = None, **options: Any) -> Any:
    trainer = pl.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": CSVLogger(str(folder), name="log", version="x"),
            "log_every_n_steps": 3,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [TelemetryCallback()] if callbacks is None else callbacks,
            **options,
        }
    )
    loader = DataLoader(rows(), batch_size=4)  # type: ignore[arg-type]
    trainer.fit(Module() if module is None else module, loader, ckpt_path=checkpoint)
    return trainer


def columns(folder: Path) -> list[dict[str, float]]:
    with (folder / "log" / "x" / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def plain(module: Any, steps: int = 12) -> torch.Tensor:
    """The same training as a loop of one's own."""
    model = small()
    opt = module.kind(model.parameters(), **module.options)
    for batch in list(DataLoader(rows(), batch_size=4))[:steps]:  # type: ignore[arg-type]
        opt.zero_grad()
        model(**batch)["loss"].backward()
        opt.step()
    return weights(model)


def test_telemetry_is_in_the_logger(tmp_path: Path) -> None:
    module = Module()
    trainer = fit(tmp_path, module)
    found = columns(tmp_path)
    assert [row["step"] for row in found] == [2, 5, 8, 11]
    assert all(KEYS | {"train_loss"} <= row.keys() for row in found), "one row with the module's own metrics"
    assert found[0]["clip_fraction"] + found[0]["floor_fraction"] > 0
    for row in found:
        assert row["grad_norm/postclip"] == pytest.approx(row["clip_coef"] * row["grad_norm/preclip"], rel=1e-5)
    assert trainer.callback_metrics.keys() >= KEYS
    assert torch.equal(weights(module), plain(module))
    assert trainer.optimizers[0].telemetry()["steps"] == 0, "each step was in a log"


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    trainer = fit(tmp_path, accumulate_grad_batches=2, log_every_n_steps=2)
    assert trainer.global_step == 6
    found = [row for row in columns(tmp_path) if "clip_coef" in row]
    assert [row["step"] for row in found] == [1, 3, 5]
    # every step is in exactly one log: with decay and momentum aside, path_length adds up
    longer = fit(tmp_path / "one", accumulate_grad_batches=2, log_every_n_steps=6)
    assert longer.global_step == 6
    total = [row for row in columns(tmp_path / "one") if "clip_coef" in row]
    assert len(total) == 1
    assert sum(row["path_length"] for row in found) == pytest.approx(total[0]["path_length"], rel=1e-5)


def test_schedules_with_warm_up_drive_lr(tmp_path: Path) -> None:
    module = Module(warm_up=True)
    fit(tmp_path, module, log_every_n_steps=1)
    assert module.lrs == pytest.approx([0, 0.0125, 0.025, 0.0375] + [0.05] * 8)
    for row, lr in zip(columns(tmp_path), module.lrs):
        assert row["path_length"] == pytest.approx(lr * row["grad_norm/postclip"], rel=1e-5)


# The counts of some steps are in the checkpoint and are logged after it; with 7, by the first step after it.
@pytest.mark.parametrize(("accumulate", "every", "logged"), [(1, 5, 2), (2, 7, 1)])
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path, accumulate: int, every: int, logged: int) -> None:
    def go(name: str, module: Any, epochs: int, checkpoint: Path | None = None) -> Any:
        return fit(
            tmp_path / name,
            module,
            checkpoint=checkpoint,
            max_epochs=epochs,
            log_every_n_steps=every,
            accumulate_grad_batches=accumulate,
        )

    whole, again = Module(nesterov=True), Module(nesterov=True)
    go("a", whole, 2)
    go("b", Module(nesterov=True), 1).save_checkpoint(tmp_path / "half.ckpt")
    go("c", again, 2, tmp_path / "half.ckpt")
    assert torch.equal(weights(whole), weights(again))
    late = [row for row in columns(tmp_path / "a") if row["step"] >= 12 // accumulate]
    assert late == columns(tmp_path / "c")
    assert len(late) == logged


def test_two_that_clip_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gradient_clip_val=0.5\) would clip .* DeltaGClip.*leave .* out"):
        fit(tmp_path, gradient_clip_val=0.5)


def test_an_optimizer_of_others_is_refused(tmp_path: Path) -> None:
    module = Module(torch.optim.SGD)
    module.options = {"lr": 0.1}
    with pytest.raises(InputError, match="configure_optimizers gave SGD"):
        fit(tmp_path, module)


def test_bf16(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, precision="bf16-mixed")
    assert torch.allclose(weights(module), plain(module), atol=2e-2)
    assert not torch.equal(weights(module), plain(module)), "autocast did nothing"
    assert all(row.keys() >= KEYS for row in columns(tmp_path))


def amp(**options: Any) -> Any:
    scaler = torch.amp.GradScaler("cpu", **options)  # type: ignore[attr-defined]
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


def test_fp16_with_a_loss_scale_and_clipping(tmp_path: Path) -> None:
    """What Lightning refuses torch's fused optimizers: clipping in a step that unscales by itself."""
    module = Module()
    plugin = amp(init_scale=2.0**10)
    trainer = fit(tmp_path, module, plugins=[plugin])
    found = columns(tmp_path)
    assert plugin.scaler.get_scale() == 2.0**10
    assert found[0]["clip_fraction"] + found[0]["floor_fraction"] > 0
    assert all(row["grad_norm/preclip"] < 100 for row in found), "norms are those of the unscaled gradient"
    assert torch.allclose(weights(module), plain(module), atol=2e-2)
    assert trainer.global_step == 12


def test_fp16_leaves_out_overflows(tmp_path: Path) -> None:
    module = Module()
    plugin = amp(init_scale=2.0**30, backoff_factor=2.0**-10)
    fit(tmp_path, module, plugins=[plugin], log_every_n_steps=12)
    row = columns(tmp_path)[-1]
    assert row["skipped"] >= 1
    assert row["clip_fraction"] + row["floor_fraction"] > 0
    assert plugin.scaler.get_scale() < 2.0**30
    assert weights(module).isfinite().all()
    assert math.isfinite(row["grad_norm/mean"])


def test_lightning_refuses_the_rivals(tmp_path: Path) -> None:
    """If this fails, Lightning has learned to clip with fused optimizers: say so in docs/integrations.md."""
    module = Module(torch.optim.SGD)
    module.options = {"lr": 0.05, "fused": True}
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(tmp_path, module, plugins=[amp()], gradient_clip_val=1.0, callbacks=[])


def test_lightning_itself_refuses_a_second_clip_under_fp16(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="DeltaGClip, does not allow for gradient clipping"):
        fit(tmp_path, plugins=[amp()], gradient_clip_val=1.0, callbacks=[])


class Two(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = small(), small()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for net, opt in zip((self.a, self.b), self.optimizers()):
            opt.zero_grad()
            self.manual_backward(net(**batch)["loss"])
            opt.step()

    def configure_optimizers(self) -> Any:
        return [
            GClip(self.a.parameters(), lr=0.1, gamma=1e-3),
            DeltaGClip(self.b.parameters(), lr=0.1, gamma=1e6, delta=0.1),
        ]


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    fit(tmp_path, Two())
    found = columns(tmp_path)
    assert len(found) == 4
    assert all(row["clip_fraction/0"] == 1 and row["clip_fraction/1"] == 0 for row in found)

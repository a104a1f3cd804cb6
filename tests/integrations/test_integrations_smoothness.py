"""The smoothness probe around the steps of Trainer and Lightning: right numbers, training bit for bit as without."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations_helpers import forget_accelerator, need, rows, small, weights
from torch.utils.data import DataLoader

from surefoot.errors import InputError
from surefoot.measure.smoothness import SmoothnessProbe


class Linear(torch.nn.Module):
    """A loss whose curvature is the same everywhere: ||x w - y||² / rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.dropout = torch.nn.Dropout(0.0)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        out = self.dropout(x.double()) @ self.w
        return {"logits": out} if labels is None else {"loss": (out - labels[:, 0]).square().mean(), "logits": out}


def noisy() -> torch.nn.Module:
    """A network with dropout: the random numbers matter."""
    model = small()
    model.body.insert(2, torch.nn.Dropout(0.3))
    return model


def trained(
    folder: Path, model: torch.nn.Module, every: int | None, **options: Any
) -> tuple[Any, SmoothnessProbe | None]:
    transformers = need("transformers")
    from surefoot.integrations.transformers import SmoothnessCallback

    forget_accelerator()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder),
            **{
                "per_device_train_batch_size": 4,
                "max_steps": 12,
                "logging_steps": 3,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "seed": 5,
                "dataloader_pin_memory": False,
                **options,
            },
        ),
        train_dataset=rows(96),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), None),
    )
    probe = SmoothnessCallback(trainer, every=every).probe if every else None
    trainer.train()
    return trainer, probe


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_goes_on_as_without(tmp_path: Path, accumulate: int) -> None:
    plain, _ = trained(tmp_path / "a", noisy(), None, gradient_accumulation_steps=accumulate)
    probed, probe = trained(tmp_path / "b", noisy(), 3, gradient_accumulation_steps=accumulate)
    assert torch.equal(weights(plain.model), weights(probed.model))
    logs = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (plain, probed)]
    assert logs[0] == logs[1]
    assert probe is not None
    assert [o.step for o in probe.observations] == [3, 6, 9, 12]
    assert all(o.outcome == "measured" and o.smoothness > 0 for o in probe.observations)
    assert all(math.isnan(o.noise) == (accumulate == 1) for o in probe.observations)


def test_trainer_measures_the_loss_that_is_trained(tmp_path: Path) -> None:
    """The norm is the one that Trainer logs, over all pieces of the batch."""
    for accumulate in (1, 2):
        trainer, probe = trained(
            tmp_path / str(accumulate),
            Linear(),
            1,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0,
            logging_steps=1,
        )
        assert probe is not None
        logged = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
        assert [o.grad_norm for o in probe.observations] == pytest.approx(logged, rel=1e-6)
        # where the batch is whole, its Hessian 2 X'X/4 lies below 2 max ||x||²
        assert all(
            0 < o.smoothness < 2 * max(float(r["x"].square().sum()) for r in rows(96)) for o in probe.observations
        )


def fitted(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    pl = need("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = noisy()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.net(**batch)["loss"]
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    torch.manual_seed(3)
    module = Module()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=str(folder),
        **options,
    )
    torch.manual_seed(4)
    trainer.fit(module, DataLoader(rows(), batch_size=4))  # type: ignore[arg-type]
    return module, trainer


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*:FutureWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_goes_on_as_without(tmp_path: Path, accumulate: int) -> None:
    need("lightning.pytorch")
    from surefoot.integrations.lightning import SmoothnessCallback

    callback = SmoothnessCallback(every=3)
    plain, one = fitted(tmp_path, [], accumulate_grad_batches=accumulate)
    probed, other = fitted(tmp_path, [callback], accumulate_grad_batches=accumulate)
    assert torch.equal(weights(plain), weights(probed))
    assert one.callback_metrics == other.callback_metrics
    assert [o.step for o in callback.probe.observations] == list(range(3, 12 // accumulate + 1, 3))
    assert all(o.outcome == "measured" and o.smoothness > 0 for o in callback.probe.observations)
    assert all(math.isnan(o.noise) == (accumulate == 1) for o in callback.probe.observations)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*:FutureWarning")
def test_lightning_with_a_loss_of_ones_own(tmp_path: Path) -> None:
    need("lightning.pytorch")
    from surefoot.integrations.lightning import SmoothnessCallback

    callback = SmoothnessCallback(every=4, loss=lambda module, batch: 10 * module.net(**batch)["loss"])
    plain = SmoothnessCallback(every=4)
    for one in (callback, plain):
        fitted(tmp_path, [one])
    ratios = [a.loss / b.loss for a, b in zip(callback.probe.observations, plain.probe.observations)]
    assert ratios == pytest.approx([10.0] * 3)


def test_lightning_refuses_manual_optimization() -> None:
    need("lightning.pytorch")
    from types import SimpleNamespace

    from surefoot.integrations.lightning import SmoothnessCallback

    module = SimpleNamespace(automatic_optimization=False)
    with pytest.raises(InputError, match="automatic optimization"):
        SmoothnessCallback().on_fit_start(SimpleNamespace(optimizers=[1, 2]), module)

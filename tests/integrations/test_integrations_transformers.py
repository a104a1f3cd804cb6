"""Hugging Face's Trainer and Accelerate with our optimizers, and the telemetry in their logs."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations_helpers import need, rows, small, weights
from torch.utils.data import DataLoader, default_collate

from surefoot import DeltaGClip
from surefoot.errors import InputError

transformers = need("transformers")
accelerate = need("accelerate")

from surefoot.integrations.transformers import TelemetryCallback  # noqa: E402

KEYS = {
    "grad_norm/preclip",
    "grad_norm/postclip",
    "grad_norm/mean",
    "grad_norm/max",
    "clip_coef",
    "clip_fraction",
    "floor_fraction",
    "skipped",
    "path_length",
}


def delta_gclip(model: torch.nn.Module, **options: Any) -> DeltaGClip:
    return DeltaGClip(model.parameters(), **{"lr": 0.05, "gamma": 1.0, "delta": 0.2, "momentum": 0.9, **options})


def train(
    folder: Path,
    *,
    resume: str | None = None,
    data: Any = None,
    callbacks: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    model: Any = None,
    **options: Any,
) -> Any:
    model = small() if model is None else model
    optimizer = delta_gclip(model) if optimizer is None else optimizer
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 24,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.0,
        "seed": 5,
        "dataloader_pin_memory": False,
    }
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=rows() if data is None else data,
        optimizers=(optimizer, scheduler and scheduler(optimizer)),
        callbacks=[TelemetryCallback()] if callbacks is None else callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def training_logs(trainer: Any) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def test_telemetry_is_in_every_training_log(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    logs = training_logs(trainer)
    assert [log["step"] for log in logs] == list(range(3, 25, 3))
    assert all(log.keys() >= KEYS for log in logs)
    assert logs[0]["clip_fraction"] > 0, "nothing was clipped: the test says nothing"
    for log in logs:
        # Trainer's own grad_norm is the norm of the same gradients
        assert log["grad_norm/preclip"] == pytest.approx(log["grad_norm"], rel=1e-5)
        assert log["grad_norm/postclip"] == pytest.approx(log["clip_coef"] * log["grad_norm/preclip"])
    assert not KEYS & trainer.state.log_history[-1].keys(), "the summary is not a training log"


def test_the_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    data = rows(4)  # one batch: Trainer's shuffling moves nothing but the order of a mean
    trainer = train(tmp_path, data=data, max_steps=10)
    model = small()
    opt = delta_gclip(model)
    # what the scheduler of Trainer does by default: linear from lr to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: max(0.0, 1 - step / 10))
    for _ in range(10):
        opt.zero_grad()
        model(**default_collate(data))["loss"].backward()
        opt.step()
        schedule.step()
    assert torch.allclose(weights(trainer.model), weights(model), rtol=1e-5, atol=1e-6)
    assert opt.telemetry()["clipped"] > 0


def test_trainers_own_clipping_is_switched_off_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = train(tmp_path)
    with caplog.at_level(logging.WARNING, logger="surefoot"):
        trainer = train(tmp_path, max_grad_norm=0.01)
        assert training_logs(trainer) == training_logs(plain)
        assert trainer.args.max_grad_norm == 0.01, "the arguments are the user's"
        trainer.train()  # the word is said once
    words = [record for record in caplog.records if record.name.startswith("surefoot")]
    assert len(words) == 1
    assert "max_grad_norm=0.01 is switched off" in words[0].message
    assert "DeltaGClip" in words[0].message
    without = train(tmp_path, max_grad_norm=0.01, callbacks=[])
    assert not torch.equal(weights(without.model), weights(plain.model)), "Trainer's clipping would have mattered"


def test_no_word_where_nothing_is_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="surefoot"):
        train(tmp_path, max_steps=2)
    assert not [record for record in caplog.records if record.name.startswith("surefoot")]


def test_an_optimizer_of_others_is_refused(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(InputError, match=r"optimizer=AcceleratedOptimizer; pass one to Trainer"):
        train(tmp_path, model=model, optimizer=torch.optim.AdamW(model.parameters()))


def test_the_optimizer_may_be_named(tmp_path: Path) -> None:
    model = small()
    opt = delta_gclip(model)
    trainer = train(tmp_path, model=model, optimizer=opt, callbacks=[TelemetryCallback(opt)], max_steps=3)
    assert training_logs(trainer)[0].keys() >= KEYS


def test_evaluation_takes_no_counts(tmp_path: Path) -> None:
    trainer = train(tmp_path, eval_strategy="no", max_steps=7)  # the last log is at 6
    trainer.evaluate(rows(8))
    assert not KEYS & trainer.state.log_history[-1].keys()
    assert trainer.optimizer.optimizer.telemetry()["steps"] == 1


@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: transformers.get_linear_schedule_with_warmup(opt, 6, 24),
        lambda opt: transformers.get_cosine_schedule_with_warmup(opt, 6, 24),
        lambda opt: torch.optim.lr_scheduler.SequentialLR(
            opt,
            [
                torch.optim.lr_scheduler.LinearLR(opt, start_factor=1e-9, total_iters=6),
                torch.optim.lr_scheduler.CosineAnnealingLR(opt, 18),
            ],
            milestones=[6],
        ),
    ],
    ids=["linear", "cosine", "torch"],
)
def test_schedules_with_warm_up_drive_lr(tmp_path: Path, schedule: Any) -> None:
    trainer = train(tmp_path, scheduler=schedule, logging_steps=1)
    lrs = [log["learning_rate"] for log in training_logs(trainer)]
    lengths = [log["path_length"] for log in training_logs(trainer)]
    assert lrs[0] == pytest.approx(0.0, abs=1e-9)
    assert lrs[6] == pytest.approx(0.05)
    assert lrs[:7] == sorted(lrs[:7])
    assert lrs[-1] < 0.01
    # η min{...}||g||: what the rule makes of the scheduled η
    for log, lr, length in zip(training_logs(trainer), lrs, lengths):
        assert length == pytest.approx(lr * log["grad_norm/postclip"], rel=1e-6)
    assert trainer.optimizer.param_groups[0]["gamma"] == 1.0


def test_warm_up_by_trainers_own_arguments(tmp_path: Path) -> None:
    trainer = train(tmp_path, logging_steps=1, warmup_steps=4, lr_scheduler_type="cosine")
    lrs = [log["learning_rate"] for log in training_logs(trainer)]
    assert lrs[:5] == pytest.approx([0, 0.0125, 0.025, 0.0375, 0.05])


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    whole = train(tmp_path, per_device_train_batch_size=8, max_steps=6, data=rows(8))
    parts = train(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=6,
        data=rows(8),
        logging_steps=6,
    )
    assert parts.state.global_step == 6
    opt = parts.optimizer.optimizer
    assert opt.telemetry()["steps"] == 0  # the log took them
    log = training_logs(parts)[-1]
    assert log["skipped"] == 0
    assert torch.allclose(weights(whole.model), weights(parts.model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, nesterov: bool) -> None:
    def go(folder: Path, resume: str | None = None) -> Any:
        model = small()
        return train(
            folder,
            model=model,
            optimizer=delta_gclip(model, nesterov=nesterov, weight_decay=0.01),
            resume=resume,
            save_strategy="steps",
            save_steps=10,
            logging_steps=4,  # 10 lies between two logs: the counts of 9 and 10 come from the checkpoint
            warmup_steps=3,
        )

    whole = go(tmp_path)
    again = go(tmp_path, resume=str(tmp_path / "checkpoint-10"))
    assert torch.equal(weights(whole.model), weights(again.model))
    first, second = training_logs(whole), training_logs(again)
    assert len(first) == len(second) == 6
    assert any(log["clip_fraction"] > 0 for log in second[2:])
    for a, b in zip(first, second):
        for key in a.keys() - {"loss"}:  # Trainer does not keep the sum of the losses since the last log
            assert a[key] == b[key], key
    saved = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text())
    assert saved["log_history"][-1].keys() >= KEYS


def test_a_bad_batch_is_left_out_and_counted(tmp_path: Path) -> None:
    data = rows(12)
    data[5]["labels"] = torch.tensor([float("nan")])
    trainer = train(tmp_path, data=data, max_steps=3, logging_steps=3)
    log = training_logs(trainer)[0]
    assert log["skipped"] == 1
    assert weights(trainer.model).isfinite().all()
    assert math.isfinite(log["grad_norm/mean"]), "the mean is over the finite norms"


def test_trainer_builds_the_optimizer(tmp_path: Path) -> None:
    """The way that gives norms and biases no decay: two groups, one norm."""
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, weight_decay=0.1
    )
    trainer = transformers.Trainer(
        small(),
        args,
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(DeltaGClip, {"lr": 0.05, "gamma": 1.0, "delta": 0.2}),
        callbacks=[TelemetryCallback()],
    )
    trainer.train()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert all(log.keys() >= KEYS for log in training_logs(trainer))


def test_a_reporter_sees_them_if_the_callback_comes_first(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    def go(*, first: bool) -> list[dict[str, float]]:
        seen.clear()
        model = small()
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
        )
        trainer = transformers.Trainer(
            model, args, train_dataset=rows(), optimizers=(delta_gclip(model), None), callbacks=[Reporter()]
        )
        if first:
            trainer.callback_handler.callbacks.insert(0, TelemetryCallback())
        else:
            trainer.add_callback(TelemetryCallback())
        trainer.train()
        return [log for log in seen if "loss" in log]

    assert all(log.keys() >= KEYS for log in go(first=True))
    assert not any(KEYS & log.keys() for log in go(first=False))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_plain_accelerate_loop(precision: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = small()
    optimizer = delta_gclip(model)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 4, 12)
    loader = DataLoader(rows(), batch_size=2, shuffle=False)  # type: ignore[arg-type]
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    lrs = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            lrs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seen = optimizer.optimizer.telemetry()
    assert seen["steps"] == 12
    assert seen["clipped"] + seen["floored"] > 0
    assert seen["skipped"] == 0
    assert lrs[:2] == [0.0, 0.0]
    assert max(lrs) == pytest.approx(0.05)
    plain = small()
    opt = delta_gclip(plain)
    schedule = transformers.get_linear_schedule_with_warmup(opt, 4, 12)
    for i in range(0, 48, 4):
        for part in (rows()[i : i + 2], rows()[i + 2 : i + 4]):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = plain(**default_collate(part))["loss"]
            (loss.float() / 2).backward()
        opt.step()
        schedule.step()
        opt.zero_grad()
    tolerance = 1e-6 if precision == "no" else 1e-3
    assert torch.allclose(weights(accelerator.unwrap_model(model)), weights(plain), atol=tolerance)


def test_accelerate_saves_and_loads_the_counts(tmp_path: Path) -> None:
    def start() -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        model = small()
        return accelerator, *accelerator.prepare(model, delta_gclip(model))

    def step(accelerator: Any, model: Any, optimizer: Any) -> None:
        batch = rows(4)
        accelerator.backward(
            model(torch.stack([r["x"] for r in batch]), torch.stack([r["labels"] for r in batch]))["loss"]
        )
        optimizer.step()
        optimizer.zero_grad()

    accelerator, model, optimizer = start()
    for _ in range(3):
        step(accelerator, model, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    step(accelerator, model, optimizer)
    accelerator, again, resumed = start()
    accelerator.load_state(str(tmp_path / "state"))
    step(accelerator, again, resumed)
    assert torch.equal(weights(model), weights(again))
    assert resumed.optimizer.telemetry() == optimizer.optimizer.telemetry()


def test_accelerate_under_a_loss_scale() -> None:
    """The step leaves out overflows itself, so Accelerate does not hear of them."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    model = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # type: ignore[attr-defined]
    optimizer = AcceleratedOptimizer(delta_gclip(model), scaler=scaler)
    before = weights(model)
    for bad, taken in ((True, False), (False, True)):
        loss = model(**default_collate(rows(4)))["loss"]
        scaler.scale(loss * (float("inf") if bad else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(weights(model), before) is not taken
        assert not optimizer.step_was_skipped
    seen = optimizer.optimizer.telemetry()
    assert (seen["steps"], seen["skipped"]) == (2, 1)
    assert seen["norm"] < 100, "the norm is that of the unscaled gradient"
    assert scaler.get_scale() == 2.0**9


def test_where_trainers_own_norm_overflows(tmp_path: Path) -> None:
    """If this fails, Trainer no longer spoils such gradients: take the line out of docs/integrations.md."""

    class Steep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(128))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": 1e19 * self.w.sum() + 0 * x.sum()}

    model = Steep()
    opt = DeltaGClip(model.parameters(), lr=0.1, gamma=1.0, delta=0.0)
    trainer = train(tmp_path, model=model, optimizer=opt, max_steps=1, logging_steps=1)
    assert training_logs(trainer)[0]["skipped"] == 1
    model = Steep()
    opt = DeltaGClip(model.parameters(), lr=0.1, gamma=1.0, delta=0.0)
    model(**default_collate(rows(4)))["loss"].backward()
    opt.step()
    assert weights(model).norm() == pytest.approx(0.1), "in a loop of one's own the step is taken"

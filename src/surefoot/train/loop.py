"""The training loop: steps, rows, evaluations, checkpoints; stopped and resumed bit for bit."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from surefoot.errors import InputError
from surefoot.measure.features import FeatureRank
from surefoot.optim.telemetry import REGIMES
from surefoot.train.batches import batch_rows
from surefoot.train.certified_steps import Violation
from surefoot.train.checkpoint import checkpoints, load_checkpoint, load_extra, remove_leftovers, save_checkpoint
from surefoot.train.config import TrainConfig, read_config
from surefoot.train.distributed import joined, shares, without_sync
from surefoot.train.document import FORMAT, VERSION, read_run, update_run
from surefoot.train.environment import environment
from surefoot.train.exploring import Exploring, ask, explorable, in_options
from surefoot.train.files import write_json
from surefoot.train.job import Job, prepare, repeatable
from surefoot.train.probing import Probing
from surefoot.train.progress import Progress
from surefoot.train.record import STEP_COLUMNS, Table
from surefoot.train.schedule import lr_factor
from surefoot.train.until_certified import UntilCertified, certifies, checked


class Diverged(Exception):
    """The loss or the gradient is no number any more; the message says where and what to lower."""


def train(config: TrainConfig, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Train from the start and return the run's document, run.json.

    Everything is checked before the folder is made. Under torchrun every process calls this, and rank 0 writes. The
    document's `status` is "finished", "interrupted" (Ctrl-C: the step was finished and a checkpoint written) or
    "diverged" (`message` says at which step, and what to lower); "failed" if a step contradicts the run's certificate.

    Args:
        config: the options; defaults are filled in.
        out: a folder that does not exist yet, or is empty.
        quiet: print no progress.

    Raises:
        InputError: an option that makes no sense; nothing has been written.
        OSError: the disk is full; the newest checkpoint is whole.
    """
    with joined(config.parallel, config.device) as team:
        team.on_main(lambda: check_out(out))
        job = team.agree(lambda: explorable(checked(prepare(config))))

        def begin() -> None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "config.json", job.config.to_json())
            write_json(out / "data.json", job.data.statistics)

        with repeatable(job.config.threads):
            untrained = ask(job) if job.config.explore_exploit else None
            team.on_main(begin)
            return _Run(job.spread(team), out, quiet, untrained).go()


def resume(folder: Path, config: TrainConfig | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Go on from the newest checkpoint of a run; the finished run is what it would have been without the stop.

    Args:
        folder: what `train` made.
        config: if given, must be the run's own, but for `parallel`: the number of processes may change too.
        quiet: print no progress.

    Raises:
        InputError: the folder is no run, the configuration is another one, or the data have changed.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"--resume {folder} is not a run: it holds no config.json; give a folder that --out made")
    stored = read_config(folder / "config.json")
    if config is not None:
        stored = replace(stored, parallel=config.parallel)
    if config is not None and (differences := _differences(stored, config)):
        raise InputError(
            f"--resume {folder} was started with another configuration: {'; '.join(differences)}; leave these "
            "options out, or start a new run with --out"
        )
    document = read_run(folder, "--resume") if (folder / "run.json").is_file() else None
    if document is not None and document["status"] == "finished":
        return document
    with joined(stored.parallel, stored.device) as team:
        team.on_main(lambda: remove_leftovers(folder))
        job = team.agree(lambda: explorable(checked(prepare(stored))))

        def begin() -> None:
            if document is not None and document["data"]["fingerprint"] != job.data_summary()["fingerprint"]:
                raise InputError(f"--resume {folder}: the data at {stored.data} have changed since the run was started")
            if not (folder / "data.json").is_file():
                write_json(folder / "data.json", job.data.statistics)

        team.on_main(begin)
        with repeatable(job.config.threads):
            return _Run(job.spread(team), folder, quiet).go()


def check_out(out: Path) -> None:
    """Raise InputError if `out` exists and is not an empty folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out} is not empty; give another folder, or go on with --resume {out}")


def _differences(stored: TrainConfig, wanted: TrainConfig) -> list[str]:
    pairs = [(k, v, asdict(wanted)[k]) for k, v in asdict(stored).items()]
    return [f"--{k.replace('_', '-')} is {a} there, not {b}" for k, a, b in pairs if a != b]


class _Run:
    """A job in its folder."""

    def __init__(self, job: Job, folder: Path, quiet: bool, untrained: FeatureRank | None = None) -> None:
        self.job, self.folder, self.team = job, folder, job.team
        self.quiet = quiet or not job.team.main
        self.step = 0
        self.seconds, self.rows = 0.0, 0
        self.metrics = Table(STEP_COLUMNS)
        self.evals = Table(tuple(dict.fromkeys(["step", "epoch", "train_loss", "test_loss", self.metric.column])))
        self.probing = Probing(job) if job.config.probe_smoothness is not None else None
        self.certifying = UntilCertified(job, folder, quiet=self.quiet) if certifies(job.config) else None
        self.exploring = Exploring(job, folder, untrained, quiet=self.quiet) if job.config.explore_exploit else None
        self.status, self.message = "running", ""
        self.counts: Counter[str] = Counter()
        self.environment = {**environment(job.device), "processes": job.team.size}
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def metric(self) -> Any:
        return self.job.objective.metric

    @property
    def certified(self) -> bool:
        return self.certifying is not None and self.certifying.done

    def go(self) -> dict[str, Any]:
        job = self.job
        self._restore()
        self._write_document()
        if self.step == 0 and not len(self.evals):
            evaluation = self._evaluate()
            if self.exploring is not None and self.exploring.due(0):
                self._freeze(evaluation)
            self._save()
        self.counts.update(self.metrics.columns["regime"])
        began, saved = time.monotonic(), time.monotonic()
        before = self.seconds
        events = _Events(self.folder / "tensorboard", self.step, job.steps) if self.team.main else _NoEvents()
        job.model.train()
        stop: float = 0
        with (
            Progress(job.steps, start=self.step, quiet=self.quiet) as progress,
            _interrupts(tell=self.team.main) as interrupted,
            events,
        ):
            try:
                while self.step < job.steps and not stop and not self.certified:
                    if self.exploring is not None and self.exploring.exploiting:
                        self._exploit(self.exploring, progress, events)
                    else:
                        self._explore(progress, events)
                    self.seconds = before + time.monotonic() - began
                    freeze = self.exploring is not None and self.exploring.due(self.step)
                    if self.step % job.eval_every == 0 or self.step == job.steps or self.certified or freeze:
                        evaluation = self._evaluate()
                        events.evaluation(evaluation)
                        if freeze:
                            self._freeze(evaluation)
                        elif self.exploring is not None and self.step == job.steps:
                            self.exploring.finish(evaluation)
                    due = self.team.main and time.monotonic() - saved >= job.config.checkpoint_seconds
                    stop, save = self.team.sum([len(interrupted), due])  # what one knows, all know
                    if save:
                        self._save()
                        saved = time.monotonic()
            except Diverged as error:
                self.status, self.message = "diverged", str(error)
                self._write_rows()
            except Violation as error:
                self.status, self.message = "failed", str(error)
                self._write_rows()
            else:
                self._save()
                if self.step < job.steps and not self.certified:
                    self.status = "interrupted"
                    self.message = f"stopped after step {self.step} of {job.steps}; go on with --resume {self.folder}"
                else:
                    self.status = "finished"
        return self._write_document()

    def _explore(self, progress: Progress, events: _Events) -> None:
        """Take a step of the optimizer, on all weights."""
        row, rows = self._take_step()
        self.rows += rows
        events.step(row)
        counts = {name: self.counts[name] for name in REGIMES}
        progress.update(self.step, rows, row["loss"], row["grad_norm"], counts)
        if self.certifying is not None:
            self.certifying.after_step(self.step, row)

    def _exploit(self, exploring: Exploring, progress: Progress, events: _Events) -> None:
        """Take some steps of the last layer, to the next evaluation at most."""
        every = self.job.eval_every
        try:
            rows = exploring.go_on(min(self.job.steps, (self.step // every + 1) * every))
        except InputError as error:
            raise Diverged(in_options(str(error))) from error
        self.step = exploring.machine.steps_taken
        events.last_layer(rows)
        progress.last_layer(self.step, rows[-1]["loss"], rows[-1]["bound"])

    def _freeze(self, evaluation: dict[str, Any]) -> None:
        """End the exploration; the checkpoint that goes with it is the next one."""
        assert self.exploring is not None
        job = self.job

        def again() -> dict[str, float]:
            with job.precision():
                return job.objective.evaluate(
                    job.model, job.data.test_x, job.data.test_y, rows=self._rows_at_once, device=job.device
                )

        try:
            self.exploring.switch(self.step, evaluation, again)
        except InputError as error:
            raise Diverged(f"--explore-exploit, at step {self.step}: {in_options(str(error))}") from error

    @property
    def _rows_at_once(self) -> int:
        return min(1000, max(self.job.batch_size, 64))

    def _take_step(self) -> tuple[dict[str, Any], int]:
        job, config = self.job, self.job.config
        picked = batch_rows(self.step, len(job.data.train_x), job.batch_size, config.seed)
        x = job.data.train_x if picked is None else job.data.train_x[picked]
        y = job.data.train_y if picked is None else job.data.train_y[picked]
        job.stepper.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        self.team.seed(config.seed, self.step)
        self.team.share_buffers(job.model)
        pieces = shares(len(x), self.team, config.micro_batch)
        for start, end in pieces:
            weight = (end - start) / len(x)
            picked = slice(start, end) if end > start else slice(0, 1)  # of no weight, but the others wait for it
            xs, ys = x[picked].to(job.device), y[picked].to(job.device)
            with without_sync(job.forward, last=(start, end) == pieces[-1]):
                with job.precision():
                    part = job.objective.value(job.forward(xs), xs, ys) * weight
                (part * self.team.size).backward()  # ddp and fsdp divide by it
            loss += part.item()
        [loss] = self.team.sum([loss])
        if not math.isfinite(loss):
            raise Diverged(self._divergence("loss", loss))
        assert config.lr is not None
        lr = config.lr * lr_factor(config.lr_schedule, self.step, job.steps, config.warmup)
        lr = lr if self.certifying is None else self.certifying.lr(lr)
        try:
            with self.probing.around(self.step + 1, x, y) if self.probing is not None else nullcontext():
                did = job.stepper.step(lr)
        except FloatingPointError as error:
            raise Diverged(self._divergence("gradient", math.nan) + f" ({error})") from error
        self.step += 1
        gamma = job.stepper.thresholds[0]
        row = {
            "step": self.step,
            "epoch": self.step / job.per_epoch,
            "loss": loss,
            "lr": lr,
            "gamma": math.nan if gamma == math.inf and config.gamma is None else gamma,
            "delta": math.nan if config.delta is None else config.delta,
            **asdict(did),
        }
        self.metrics.append(row)
        self.counts[did.regime] += 1
        return row, len(x)

    def _divergence(self, what: str, value: float) -> str:
        c = self.job.config
        norms = self.metrics.columns["grad_norm"]
        last = f"the gradient norm was {norms[-1]:.4g} at step {len(norms)}" if norms else "no step had been taken"
        kept = checkpoints(self.folder / "checkpoints")
        lower = f"--lr (now {c.lr:g})" + (f" or --gamma (now {c.gamma:g})" if c.gamma is not None else "")
        return (
            f"{what} became {value} at step {self.step + 1}; {last}. The last good weights are kept in "
            f"{kept[-1] if kept else self.folder}; lower {lower}"
        )

    def _evaluate(self) -> dict[str, Any]:
        job = self.job
        since = self.evals.columns["step"][-1] if len(self.evals) else 0
        losses = self.metrics.columns["loss"][since:]
        if self.exploring is not None:
            losses += self.exploring.losses(since)
        self.team.share_buffers(job.model)
        x, y = job.data.test_x, job.data.test_y
        with job.precision():
            result = job.objective.evaluate(job.model, x, y, rows=self._rows_at_once, device=job.device, team=self.team)
        row = {
            "step": self.step,
            "epoch": self.step / job.per_epoch,
            "train_loss": math.fsum(losses) / len(losses) if losses else math.nan,
            **result,
        }
        self.evals.append(row)
        return row

    def _save(self) -> None:
        self._write_rows()
        progress: dict[str, Any] = {"seconds": self.seconds, "rows": self.rows}
        tensors = None
        if self.exploring is not None:
            progress["exploring"], tensors = self.exploring.save(self.step)
        folder, job = self.folder / "checkpoints", self.job
        save_checkpoint(folder, self.step, job.model, job.stepper.optimizer, progress, self.team, tensors)

    def _write_rows(self) -> None:
        def write() -> None:
            self.metrics.write(self.folder / "metrics.parquet")
            self.evals.write(self.folder / "evals.parquet")
            if self.probing is not None:
                self.probing.table.write(self.folder / "smoothness.parquet")
            if self.certifying is not None:
                self.certifying.write()
            if self.exploring is not None:
                self.exploring.write()

        self.team.on_main(write)

    def _restore(self) -> None:
        found = checkpoints(self.folder / "checkpoints")
        if not found:
            return
        self.step, progress = load_checkpoint(found[-1], self.job.model, self.job.stepper.optimizer)
        self.seconds, self.rows = progress["seconds"], progress["rows"]
        self.metrics.load(self.folder / "metrics.parquet", through=self.step)
        self.evals.load(self.folder / "evals.parquet", through=self.step)
        if self.probing is not None:
            self.probing.table.load(self.folder / "smoothness.parquet", through=self.step)
        if self.certifying is not None:
            self.certifying.restore(self.step)
        if self.exploring is not None:
            self.exploring.restore(progress["exploring"], load_extra(found[-1]), self.step)

    def _write_document(self) -> dict[str, Any]:
        job, metric = self.job, self.metric
        head = {
            "format": FORMAT,
            "version": VERSION,
            "title": job.title,
            "status": self.status,
            "message": self.message,
            "config": job.config.to_json(),
            "environment": {**self.environment, "started": self.started},
            "data": job.data_summary(),
            "model": {"name": job.config.model, "parameters": job.parameters},
            "metric": asdict(metric),
            "total_steps": job.steps,
            "seconds": self.seconds,
            "rows": self.rows,
            **({"last_layer_steps": self.exploring.taken} if self.exploring is not None else {}),
        }
        smoothness = self.probing.table if self.probing is not None else None
        return self.team.on_main(lambda: update_run(self.folder, head, self.metrics, self.evals, smoothness))


class _Events:
    """TensorBoard events, under the names people look for."""

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        self.every = max(1, steps // 500)

    def __enter__(self) -> _Events:
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] % self.every == 0:
            names = {"loss": "train/loss", "grad_norm": "grad_norm/preclip", "scale": "clip_coef", "lr": "lr"}
            for column, name in names.items():
                self.writer.add_scalar(name, row[column], row["step"])
            self.writer.add_scalar("grad_norm/postclip", row["scale"] * row["grad_norm"], row["step"])
            self.writer.add_scalar("step_length", row["step_length"], row["step"])

    def last_layer(self, rows: list[dict[str, float]]) -> None:
        for row in rows:
            if row["step"] % self.every == 0:
                self.writer.add_scalar("last_layer/loss", row["loss"], row["step"])
                if math.isfinite(row["bound"]):
                    self.writer.add_scalar("last_layer/bound", row["bound"], row["step"])

    def evaluation(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self.writer.add_scalar(f"eval/{name}", value, row["step"])


class _NoEvents(_Events):
    """What the other ranks have."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, row: dict[str, Any]) -> None:
        pass

    def last_layer(self, rows: list[dict[str, float]]) -> None:
        pass

    def evaluation(self, row: dict[str, Any]) -> None:
        pass


@contextmanager
def _interrupts(*, tell: bool) -> Iterator[list[int]]:
    """Collect Ctrl-C instead of dying of it; a second one is obeyed at once."""
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if tell:
            print("\nfinishing this step and writing a checkpoint (Ctrl-C again to stop at once)", flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def default_name(config: TrainConfig) -> str:
    """Return a folder name that says when and what: 20260131-235900-mlp-digits-delta-gclip."""
    c = config
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{Path(c.model.rpartition(':')[0] or c.model).stem}-{Path(c.data).stem}-{c.optimizer}"

"""Training loop of one stage: runs for a time budget, keeps an average of the weights, resumes after interruption."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Loss = Callable[[float], Tensor]
"""Maps the completed share of the stage, 0 to 1, to the loss of a batch that it draws itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Duration of a stage: `seconds`, or exactly `steps` if given."""

    seconds: float
    steps: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Training parameters of a stage."""

    learning_rate: float
    """Peak value; it rises over the first steps and falls along a cosine."""
    ema_decay: float = 0.998
    half_precision: bool = True
    """Multiply in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Directory, device and seed of this training, the same for all of its stages."""

    directory: Path
    device: torch.device
    seed: int = 0
    resume: bool = False

    def network_dir(self, name: str) -> Path:
        """Return the directory of a stage's trained network for later stages, in float32."""
        return self.directory / "networks" / name

    def state_file(self, stage: str) -> Path:
        """Return the file that a stage resumes from."""
        return self.directory / "state" / f"{stage}.pt"


def fit(
    network: nn.Module,
    loss: Loss,
    *,
    stage: str,
    run: Run,
    budget: Budget,
    pace: Pace,
    parameters: Sequence[nn.Parameter] | None = None,
) -> list[float]:
    """Train `network` in place, leave the running average of its weights in it, return the losses.

    The state is saved every minute; with `run.resume` a stage continues from there, even one that
    was finished and has got a longer budget.
    """
    torch.manual_seed(_stage_seed(run.seed, stage))
    network.to(run.device).train()
    trained = [value for value in parameters or network.parameters() if value.requires_grad]
    session = _Session(
        network=network,
        average=_Average(network, decay=pace.ema_decay),
        optimizer=torch.optim.AdamW(trained, lr=pace.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True),
        file=run.state_file(stage),
        autocast=torch.autocast(run.device.type, torch.bfloat16, enabled=pace.half_precision),
    )
    if run.resume:
        session.restore(run.device)
    progress = session.progress(budget)
    with tqdm(total=100, initial=int(100 * progress), desc=stage, unit="%", bar_format=_BAR) as bar:
        while progress < 1:
            for group in session.optimizer.param_groups:
                group["lr"] = pace.learning_rate * _rate(progress, session.step)
            session.take(loss, progress, trained)
            progress = session.progress(budget)
            if session.step % _REPORT_STEPS == 0 or progress >= 1:
                bar.set_postfix_str(f"{session.step} steps, loss {session.report():.4f}")
                bar.update(min(100, int(100 * progress)) - bar.n)
    session.save()
    session.average.write_into(network)
    network.eval()
    return session.losses


_BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {postfix}"
_REPORT_STEPS = 20
_SAVE_EVERY_S = 60
_WARM_UP_STEPS = 60


@dataclass(slots=True, kw_only=True)
class _Session:
    """State that a stage needs to resume after an interruption."""

    network: nn.Module
    average: "_Average"
    optimizer: torch.optim.Optimizer
    file: Path
    autocast: torch.autocast
    step: int = 0
    elapsed_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    """The mean of every _REPORT_STEPS steps."""
    _unread: list[Tensor] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)

    def progress(self, budget: Budget) -> float:
        if budget.steps is not None:
            return self.step / budget.steps
        return (self.elapsed_s + time.monotonic() - self._since) / budget.seconds

    def take(self, loss: Loss, progress: float, trained: Sequence[nn.Parameter]) -> None:
        with self.autocast:
            value = loss(progress)
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.network, self.step)
        # Reading a loss waits for the device, so twenty are read at once.
        self._unread.append(value.detach())

    def report(self) -> float:
        self.losses.append(torch.stack(self._unread).mean().item())
        self._unread.clear()
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self.save()
        return self.losses[-1]

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        torch.save(self._state(), partial)
        partial.replace(self.file)
        self._saved = time.monotonic()

    def restore(self, device: torch.device) -> None:
        if not self.file.exists():
            return
        state: dict[str, Any] = torch.load(self.file, map_location=device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.values = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s, self.losses = state["step"], state["elapsed_s"], state["losses"]
        torch.set_rng_state(state["rng"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["device_rng"].cpu(), device)

    def _state(self) -> dict[str, Any]:
        on_gpu = torch.cuda.is_available()
        return {
            "network": self.network.state_dict(),
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s + time.monotonic() - self._since,
            "losses": self.losses,
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if on_gpu else torch.get_rng_state(),
        }


class _Average:
    """Exponential average of the parameters that forgets its random start."""

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.values = [value.detach().clone() for value in network.parameters()]

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        current = [value.detach() for value in network.parameters()]
        torch._foreach_lerp_(self.values, current, 1 - decay)

    @torch.no_grad()
    def write_into(self, network: nn.Module) -> None:
        for value, average in zip(network.parameters(), self.values, strict=True):
            value.copy_(average)


def _stage_seed(seed: int, stage: str) -> int:
    return seed * 1000 + sum(stage.encode())


def _rate(progress: float, step: int) -> float:
    """Return the share of the learning rate: linear warm-up, then a cosine down to 2 %."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return min(1, (step + 1) / _WARM_UP_STEPS) * cosine

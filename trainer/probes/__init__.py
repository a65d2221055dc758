"""Probes of layers and of the loss between two steps, without side effects.

docs/probes.md has their definitions and costs.
"""

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from syncbn import Moments
from trainer.data import Batch
from trainer.distributed import RankInfo
from trainer.errors import ConfigurationError
from trainer.jobspec import JobSpec, Norm
from trainer.probes.hooks import HookPoint, Observer, activation_inputs, named_modules, norm_inputs
from trainer.probes.landscape import landscape
from trainer.probes.layers import GatheredStats
from trainer.probes.objective import Objective
from trainer.probes.statistics import discrepancy, drift, percentiles, values_per_channel, variance_share
from trainer.probes.sync_cost import StepTimer, sync_cost
from trainer.probes.weights import CovariateShift, gradient_norms, layers_with_weights

__all__ = ["Probes"]

OF_ACTIVATIONS = ("percentiles", "drift")
OF_NORMS = ("discrepancy", "variance_share", "sync_cost")
OF_GRADIENTS = ("gradient_norm", "landscape", "shift")


class Probes:
    """Measurements of a specification; all workers measure together.

    Hook points are the outputs of `spec.probes.layers`; by default, the inputs of all activation modules and,
    for the measurements of workers, of all normalisation layers, or of the activations if there are none.

    Raises ConfigurationError for layers that the model does not have, and for a measurement without anything
    to measure.
    """

    def __init__(
        self,
        spec: JobSpec,
        model: nn.Module,
        worker: RankInfo,
        autocast: AbstractContextManager[object] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Choose the hook points.

        `model` is the trained model, sharded if it will be, without DistributedDataParallel around it;
        `autocast` is the context of its passes.
        """
        self._spec, self._model, self._worker = spec, model, worker
        self._autocast, self._scaler = autocast or nullcontext(), scaler
        self._wanted = frozenset(spec.probes.measure)
        named = named_modules(model, spec.probes.layers)
        self._of_activations, self._of_norms = self._choose_places(named)
        self._layers = layers_with_weights(model, named)
        self._shift = CovariateShift(model, named)
        if "shift" in self._wanted and not self._shift.layers:
            raise ConfigurationError(
                "probes.layers",
                spec.probes.layers,
                "must be modules with trained weights for `shift`",
            )
        self._before: dict[str, Moments] = {}
        self.timer = StepTimer()
        """Timer of the training steps between measurements."""

    def are_due(self, step: int) -> bool:
        """Return whether to measure before training step `step`."""
        return bool(self._wanted) and step % self._spec.probes.every == 0

    def measure(self, parts: Sequence[Batch], rate: float) -> dict[str, float]:
        """Measure on a step's batch with the weights before the step.

        Returns values by metric name, equal on every worker, without those that are not finite. Weights,
        gradients, buffers and random states are restored.

        Args:
            parts: this worker's share of each part of the global batch.
            rate: learning rate of the step.

        Raises ConfigurationError if a hook point was not reached by the forward pass, or has no tensor with
        channels.
        """
        scale = self._scaler.get_scale() if self._scaler is not None else 1.0
        size = self._spec.global_batch_size
        objective = Objective(self._model, parts, size, self._worker, self._autocast, scale)
        values: dict[str, float] = {}
        # A compiled model would not call the hooks that are registered now.
        with torch.compiler.set_stance("force_eager") if self._spec.compile else nullcontext():
            if self._of_activations or self._of_norms:
                values |= self._measure_places(objective)
            if self._wanted.intersection(OF_GRADIENTS):
                values |= self._measure_gradients(objective, rate)
        return {f"probe/{_clean(name)}": value for name, value in values.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Return the reference of drift, equal on every worker."""
        return {name: moments.pack() for name, moments in self._before.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self._before = {name: Moments.unpack(vector) for name, vector in state.items()}

    def _choose_places(self, named: dict[str, nn.Module]) -> tuple[list[HookPoint], list[HookPoint]]:
        activations = norms = [HookPoint(path, module, is_input=False) for path, module in named.items()]
        if not named:
            activations = activation_inputs(self._model)
            # Without norms the inputs of activations are where norms would be.
            norms = norm_inputs(self._model) or activations
        chosen = [
            (places, bool(self._wanted.intersection(probes)))
            for places, probes in ((activations, OF_ACTIVATIONS), (norms, OF_NORMS))
        ]
        if any(is_wanted and not places for places, is_wanted in chosen):
            rule = f"must be given: {self._spec.model.name} has no activation modules"
            raise ConfigurationError("probes.layers", [], rule)
        of_activations, of_norms = (places if is_wanted else [] for places, is_wanted in chosen)
        return of_activations, of_norms

    def _measure_places(self, objective: Objective) -> dict[str, float]:
        observer = Observer(
            {place.path: place for place in (*self._of_activations, *self._of_norms)}.values()
        )
        with observer.watch(self._model):
            objective.forward()
        gathered = GatheredStats(observer.seen, self._worker)
        names = list(observer.seen[0])
        return self._of_the_batch(
            gathered, [name for name in names if _is_of(name, self._of_activations)]
        ) | (self._of_the_workers(gathered, [name for name in names if _is_of(name, self._of_norms)]))

    def _of_the_batch(self, gathered: GatheredStats, names: list[str]) -> dict[str, float]:
        values: dict[str, float] = {}
        if "percentiles" in self._wanted:
            for name, (unit, numbers) in gathered.units(names).items():
                for percent, value in percentiles(numbers).items():
                    values[f"{name}/unit{unit}/p{percent}"] = value
        if "drift" in self._wanted:
            after = {name: gathered.total(name) for name in names}
            for name in names:
                if name in self._before:
                    moves = drift(self._before[name], after[name])
                    values[f"{name}/mean_drift"], values[f"{name}/variance_drift"] = moves
            self._before = after
        return values

    def _of_the_workers(self, gathered: GatheredStats, names: list[str]) -> dict[str, float]:
        values: dict[str, float] = {}
        if "sync_cost" in self._wanted:
            channels = [len(gathered.parts[0][name][0].mean) for name in names]
            values |= sync_cost(channels, self.timer.seconds, self._worker)
        for name in names:
            values[f"{name}/values_per_channel"] = gathered.mean_over_parts(name, values_per_channel)
            if "discrepancy" in self._wanted:
                values[f"{name}/discrepancy"] = gathered.mean_over_parts(name, discrepancy)
                if self._spec.norm in (Norm.BATCH, Norm.SYNC):
                    values[f"{name}/discrepancy_used"] = gathered.mean_over_parts(
                        name, self._discrepancy_used
                    )
            if "variance_share" in self._wanted:
                values[f"{name}/variance_share"] = gathered.mean_over_parts(name, variance_share)
        return values

    def _discrepancy_used(self, by_worker: Sequence[Moments]) -> float:
        """Return the discrepancy of the statistics that batch normalisation uses.

        These are the statistics of one worker, or of the workers that share them.
        """
        # Groups consist of consecutive ranks, as in syncbn.groups.
        size = 1 if self._spec.norm is Norm.BATCH else self._spec.sync_group_size or len(by_worker)
        return discrepancy(
            [Moments.merge(by_worker[first : first + size]) for first in range(0, len(by_worker), size)]
        )

    def _measure_gradients(self, objective: Objective, rate: float) -> dict[str, float]:
        with self._shift.watch():
            _, gradient = objective.loss_and_gradient()
        values: dict[str, float] = {}
        if "gradient_norm" in self._wanted:
            values |= gradient_norms(objective, gradient, self._layers)
        if "landscape" in self._wanted:
            values |= landscape(objective, gradient, rate)
        if "shift" in self._wanted:
            values |= self._shift.measure(objective, gradient, rate)
        return values


def _is_of(name: str, places: Sequence[HookPoint]) -> bool:
    return any(place.path == name.partition(":")[0] for place in places)


def _clean(name: str) -> str:
    """Replace characters that MLflow does not allow in the name of a metric."""
    return re.sub(r"[^\w.\-: /]", "_", name)

"""Train as train.py does, for measurements: without a run folder, validation or plots.

trainer = Trainer(config, device)
train.init_codebook(trainer.model, slices, config, device)
trainer.train_epoch(slices)
losses, finite = trainer.step(images)
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dataset
import train
import utils
from dataset import SliceDataset
from modules import VQVAE, Quantized
from training.config import TrainConfig
from training.run import SEED_STRIDE, epoch_order
from training.schedule import learning_rate, set_learning_rate
from training.step import clip_gradients, compile_if_enabled, may_step
from training.totals import EpochTotals


class Trainer:
    """A VQ-VAE, its optimizer, and the training steps of train.py, for one process without --gan.

    Args:
        config: a configuration of train.py.
        device: the device to train on.
        channels_last: whether the model is in channels-last memory layout, as in train.py.
    """

    def __init__(self, config: TrainConfig, device: torch.device, channels_last: bool = True):
        if config.gan:
            raise ValueError("gan is True; expected a configuration without an adversarial loss")
        self.config = config
        self.device = device
        self.epochs_done = 0
        torch.manual_seed(config.seed)
        arguments = {name: getattr(config, name) for name in inspect.signature(VQVAE).parameters}
        self.model = VQVAE(**arguments)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.model.to(device)
        self.optimizer = train.make_optimizer(self.model, None, config)
        precision = utils.pick_precision(config.precision, device)

        def eager_losses(images: Tensor) -> tuple[Tensor, Quantized]:
            return train.compute_losses(self.model, None, images, precision, config)

        self._eager_losses = eager_losses
        self._losses_of_full_batch = compile_if_enabled(eager_losses, config, device)

    @property
    def is_compiled(self) -> bool:
        """Whether the losses of full batches are computed by a compiled function."""
        return self._losses_of_full_batch is not self._eager_losses

    def step(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a batch (B, 1, H, W) and update the model once.

        Returns:
            The losses (2,), and a bool () that is true if the gradients were finite. Both are
            tensors on the device, so that the call does not wait for a GPU.
        """
        is_full = len(images) == self.config.batch_size
        compute = self._losses_of_full_batch if is_full else self._eager_losses
        images = dataset.augment(images, self.config.crop, self.config.augment)
        losses, quantized = compute(images)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        finite = clip_gradients([self.model], self.config.clip_grad_norm)
        if may_step(finite, self.optimizer):
            self.optimizer.step()
        self.model.vector_quantization.update_codebook(quantized.vectors, quantized.indices)
        return losses.detach(), finite

    def train_epoch(self, slices: SliceDataset) -> None:
        """Train on all slices once, with the order, seeds and learning rates of train.py."""
        config = self.config
        order = epoch_order(len(slices), config.seed, self.epochs_done + 1)
        batches = order.split(config.batch_size)
        totals = EpochTotals(len(train.LOSSES), self.device)
        first_step = self.epochs_done * len(batches)
        for number, images in enumerate(slices.batches(batches, self.device), start=first_step):
            torch.manual_seed(config.seed * SEED_STRIDE + number)
            rate = learning_rate(config, number, config.epochs * len(batches))
            set_learning_rate(self.optimizer, rate)
            losses, finite = self.step(images)
            totals.add(losses, finite, len(images), number + 1)
        self.epochs_done += 1
        totals.nonfinite_step.item()  # train.py waits for the device here, too

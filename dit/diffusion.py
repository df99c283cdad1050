"""What the network predicts, and the loss of its prediction: eps (with learned sigma), x0, v, and flow matching.

Notation of Ho et al. (2020): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with abar_t the running product of 1 - beta_t and
beta linear in t, given for 1000 timesteps and scaled for others. Flow matching (Lipman et al. 2023; Ma et al. 2024, SiT, linear
path): x_s = (1 - s) x_0 + s eps, s in [0, 1). Timesteps are whole numbers in [0, num_timesteps), or
s * num_timesteps for flow matching.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dit.sections import DiffusionParams
from dit.timesteps import scale_betas

BELOW_ONE = 1 - 2.0**-24
"""The largest float32 below 1; `torch.rand` draws no larger number."""

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A network, or another function, that is called as `model(x, t, y)`."""


@dataclass(frozen=True)
class Batch:
    """Normalised latents `x0` and noise `eps` (B, C, H, W), timesteps (B,), labels (B,); a dropped label is the null class."""

    x0: Tensor
    eps: Tensor
    timesteps: Tensor
    labels: Tensor

    def first(self, count: int) -> Batch:
        """The first `count` samples of this batch."""
        return self.rows(slice(count))

    def rows(self, chosen: slice) -> Batch:
        """The samples of this batch that the slice `chosen` selects."""
        return Batch(*(tensor[chosen] for tensor in (self.x0, self.eps, self.timesteps, self.labels)))


@dataclass(frozen=True)
class Loss:
    """Per sample (B,): the squared error of the prediction, and the variational bound, zero if sigma is not learned."""

    mse: Tensor
    vlb: Tensor

    @property
    def total(self) -> Tensor:
        """L_simple + L_vlb, the hybrid of Nichol & Dhariwal (2021), eq. 16; L_vlb has weight 1, as in the published DiT."""
        return self.mse + self.vlb


class Diffusion:
    """The noising, the target and the loss of one training objective, on one device."""

    def __init__(self, params: DiffusionParams, device: torch.device | str = "cpu") -> None:
        self.objective = params.objective
        self.learn_sigma = params.learn_sigma
        self.num_timesteps = params.num_timesteps
        self.device = torch.device(device)
        self.timestep_sampling = params.timestep_sampling
        self.logit_normal_mean, self.logit_normal_std = params.logit_normal_mean, params.logit_normal_std
        if params.objective != "flow":
            self._fill_tables(params)

    def _fill_tables(self, params: DiffusionParams) -> None:
        """Fill the tables of coefficients by timestep, which the betas determine; flow matching has no betas."""
        first, last = scale_betas(params.beta_start, params.beta_end, params.num_timesteps)
        beta = torch.linspace(first, last, params.num_timesteps, dtype=torch.float64)
        abar = (1 - beta).cumprod(0)
        abar_before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        posterior_variance = beta * (1 - abar_before) / (1 - abar)
        self.signal = self._table(abar.sqrt())
        self.noise = self._table((1 - abar).sqrt())
        self.log_beta = self._table(beta.log())
        # The posterior variance is 0 at t = 0; there the published code uses the posterior variance of t = 1.
        self.posterior_log_variance = self._table(torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log())
        self.posterior_from_x0 = self._table(beta * abar_before.sqrt() / (1 - abar))
        self.posterior_from_xt = self._table((1 - abar_before) * (1 - beta).sqrt() / (1 - abar))

    def _table(self, values: Tensor) -> Tensor:
        return values.float().to(self.device)

    def draw_timesteps(self, count: int, generator: Generator) -> Tensor:
        """Draw the timesteps (count,) of a training batch from `generator` alone: int64, or float32 for flow matching.

        They are uniform, or `logit_normal`: t / num_timesteps is the sigmoid of a normal number, so noisy timesteps are more
        frequent if the mean is above zero. Esser et al. (2024), section 3.1, propose this for flow matching.
        """
        if self.timestep_sampling == "uniform":
            return self.timesteps_at(torch.rand(count, generator=generator, device=self.device))
        normal = torch.randn(count, generator=generator, device=self.device)
        fraction = torch.sigmoid(self.logit_normal_mean + self.logit_normal_std * normal)
        return self.timesteps_at(fraction.clamp(max=BELOW_ONE))

    def timesteps_at(self, fraction: Tensor) -> Tensor:
        """Fractions t / num_timesteps (B,) in [0, 1) -> timesteps (B,)."""
        t = fraction * self.num_timesteps
        return t if self.objective == "flow" else t.long().clamp(max=self.num_timesteps - 1)

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, 1, 1, 1) of the clean latent and of the noise in x_t."""
        if self.objective == "flow":
            s = (t / self.num_timesteps).view(-1, 1, 1, 1)
            return 1 - s, s
        return _at(self.signal, t), _at(self.noise, t)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Clean latents and noise (B, C, H, W), timesteps (B,) -> noisy latents x_t (B, C, H, W)."""
        signal, noise = self._mixture(t)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The target (B, C, H, W) of the first C channels of the network's output.

        For `v` it is the v of Salimans & Ho (2022), section 4; for `flow`, the velocity d x_s / d s.
        """
        if self.objective == "eps":
            return eps
        if self.objective == "x0":
            return x0
        if self.objective == "flow":
            return eps - x0
        signal, noise = self._mixture(t)
        return signal * eps - noise * x0

    @property
    def zero_output_error(self) -> float:
        """The expected squared error E[target^2] of a network that outputs zero, for latents of unit variance.

        It is 1 for eps and x0. For v it is signal^2 + noise^2, which is 1 at every timestep. For flow it is 2, because the
        target is noise minus latent.
        """
        return 2.0 if self.objective == "flow" else 1.0

    def training_loss(self, model: Denoise, batch: Batch, loss: Callable[..., Loss] | None = None) -> Loss:
        """Add noise to a batch, call the network, and compute its loss. `loss` may be a compiled version of `self.loss`."""
        x_t = self.add_noise(batch.x0, batch.eps, batch.timesteps)
        output = model(x_t, batch.timesteps, batch.labels)
        return (loss or self.loss)(output, batch.x0, batch.eps, batch.timesteps, x_t)

    def loss(self, output: Tensor, x0: Tensor, eps: Tensor, t: Tensor, x_t: Tensor) -> Loss:
        """The loss of the network's output (B, C or 2C, H, W): of its prediction and, if sigma is learned, of its sigma."""
        output = output.float()
        if not self.learn_sigma:
            mse = _mean((output - self.target(x0, eps, t)) ** 2)
            return Loss(mse, torch.zeros_like(mse))
        prediction, fraction = output.chunk(2, dim=1)
        mse = _mean((prediction - self.target(x0, eps, t)) ** 2)
        return Loss(mse, self._variational_bound(prediction.detach(), fraction, x0, t, x_t))

    def _variational_bound(self, eps: Tensor, fraction: Tensor, x0: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """One term of L_vlb in bits per dimension, (B,). The caller detaches `eps`, so this term trains sigma alone.

        Nichol & Dhariwal (2021), eq. 14 to 16. At t = 0 the term is the negative log-likelihood of x_0 in bins of width 2/255,
        as in the published code, although latents are not 8-bit.
        """
        predicted_x0 = (x_t - _at(self.noise, t) * eps) / _at(self.signal, t)
        mean = self._posterior_mean(predicted_x0, x_t, t)
        true_mean = self._posterior_mean(x0, x_t, t)
        weight = (fraction + 1) / 2
        log_variance = weight * _at(self.log_beta, t) + (1 - weight) * _at(self.posterior_log_variance, t)
        divergence = _normal_divergence(true_mean, _at(self.posterior_log_variance, t), mean, log_variance)
        likelihood = -_binned_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(t == 0, _mean(likelihood), _mean(divergence)) / math.log(2)

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0); Ho et al. (2020), eq. 7."""
        return _at(self.posterior_from_x0, t) * x0 + _at(self.posterior_from_xt, t) * x_t


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def _normal_divergence(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(p || q) of two diagonal normals, elementwise, in nats."""
    return 0.5 * (log_var_q - log_var_p - 1 + (log_var_p - log_var_q).exp() + (mean_p - mean_q) ** 2 * (-log_var_q).exp())


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around `x` in [-1, 1], the outermost bins open; Ho et al. (2020), eq. 13."""
    upper = _normal_cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = _normal_cdf((x - mean - 1 / 255) * (-log_std).exp())
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The normal CDF, by the tanh approximation of Page (1977), as in openai/guided-diffusion `losses.py`."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

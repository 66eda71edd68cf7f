"""Fake of ``k_diffusion.external``: from a network's own output to x0."""

import torch
from torch import nn


class _Schedule(nn.Module):
    def __init__(self, sd_model, quantize):
        super().__init__()
        sigmas = ((1 - sd_model.alphas_cumprod) / sd_model.alphas_cumprod) ** 0.5
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.inner_model, self.quantize = sd_model, quantize

    def sigma_to_t(self, sigma):
        apart = sigma.log() - self.log_sigmas[:, None]
        if self.quantize:
            return apart.abs().argmin(dim=0).view(sigma.shape)
        low = apart.ge(0).cumsum(dim=0).argmax(dim=0).clamp(max=len(self.sigmas) - 2)
        below, above = self.log_sigmas[low], self.log_sigmas[low + 1]
        share = ((below - sigma.log()) / (below - above)).clamp(0, 1)
        return ((1 - share) * low + share * (low + 1)).view(sigma.shape)

    def t_to_sigma(self, t):
        low, high, share = t.float().floor().long(), t.float().ceil().long(), t.float().frac()
        return ((1 - share) * self.log_sigmas[low] + share * self.log_sigmas[high]).exp()

    def _output(self, x, sigma, cond):
        level = sigma.view(-1, 1, 1, 1)
        scaled = x / (level**2 + 1).sqrt()
        return level, self.inner_model.apply_model(scaled, self.sigma_to_t(sigma), cond=cond)


class CompVisDenoiser(_Schedule):
    def forward(self, x, sigma, cond):
        level, eps = self._output(x, sigma, cond)
        return x - eps * level


class CompVisVDenoiser(_Schedule):
    def forward(self, x, sigma, cond):
        level, v = self._output(x, sigma, cond)
        return x / (level**2 + 1) - v * level / (level**2 + 1).sqrt()


__all__ = ["CompVisDenoiser", "CompVisVDenoiser", "torch"]

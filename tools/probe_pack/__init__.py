"""A custom node for tests: lets them look, through the host, at what a model predicts."""

from __future__ import annotations

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch


class ProbePrediction:
    """The noise prediction of a MODEL for one prompt, as numbers in the graph's outputs."""

    CATEGORY = "testing"
    FUNCTION = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "conditioning": ("CONDITIONING",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31}),
                "progress": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0}),
                "size": ("INT", {"default": 64, "min": 16, "max": 512, "step": 8}),
            }
        }

    def probe(self, model, conditioning, seed, progress, size):
        comfy.model_management.load_models_gpu([model])
        sampling = model.get_model_object("model_sampling")
        sigma = torch.tensor([float(sampling.percent_to_sigma(progress))])
        noise = torch.randn(
            (1, 4, size // 8, size // 8), generator=torch.Generator().manual_seed(seed)
        )
        x = sampling.noise_scaling(sigma, noise, torch.zeros_like(noise)).to(model.load_device)
        sigma = sigma.to(x)
        conds = {"probe": comfy.sampler_helpers.convert_cond(conditioning)}
        conds = comfy.samplers.process_conds(model.model, noise, conds, x.device, seed=seed)
        model.pre_run()
        try:
            clean = comfy.samplers.calc_cond_batch(
                model.model, [conds["probe"]], x, sigma, model.model_options
            )[0]
        finally:
            model.cleanup()
        prediction = ((x - clean) / sigma).flatten().tolist()
        return {"ui": {"prediction": prediction, "sigma": sigma.tolist()}}


NODE_CLASS_MAPPINGS = {"ProbePrediction": ProbePrediction}

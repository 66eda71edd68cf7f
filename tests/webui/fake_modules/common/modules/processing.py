"""Fake of ``modules.processing``: pictures are drawn in a few Euler steps with the loaded model."""

from types import SimpleNamespace

import torch

from . import extra_networks, prompt_parser, sd_models, sd_samplers_common, shared


def txt2img_image_conditioning(sd_model, x, width, height):
    """What an inpainting model reads beside the latent: a mask of ones, and a grey picture."""
    empty = torch.full((len(x), 4, height // 8, width // 8), 0.25)
    return torch.nn.functional.pad(empty, (0, 0, 0, 0, 1, 0), value=1.0)


class StableDiffusionProcessingTxt2Img:
    """A picture as it is asked for."""

    def __init__(self, sd_model=None, prompt="", seed=0, steps=4, script=None, args=(), **named):
        self.sd_model, self.prompt, self.seed, self.steps = sd_model, prompt, seed, steps
        self.width, self.height = named.pop("width", 64), named.pop("height", 64)
        self.cfg_scale, self.batch_size = named.pop("cfg_scale", 1.0), named.pop("batch_size", 1)
        self.enable_hr = named.pop("enable_hr", False)
        self.script, self.args, self.named = script, args, named
        self.extra_generation_params, self.comments = {}, []
        self.extra_network_data = self.hr_extra_network_data = None

    def comment(self, text):
        self.comments.append(text)

    def close(self):
        self.closed = True

    def parse_extra_network_prompts(self):
        parsed = [extra_networks.parse_prompt(prompt) for prompt in self.prompts]
        self.prompts = [text for text, _ in parsed]
        self.extra_network_data = parsed[0][1]
        if self.enable_hr:
            self.hr_extra_network_data = extra_networks.parse_prompt(self.prompt)[1]


def process_images(p):
    """In the order of the hosts' ``process_images_inner``."""
    reload = getattr(sd_models, "forge_model_reload", None)
    if reload is not None:
        reload()
    p.all_prompts = [p.prompt] * p.batch_size
    if p.script is not None:
        p.script.process(p, *p.args)
    p.prompts = list(p.all_prompts)
    if p.script is not None:
        named = dict(batch_number=0, prompts=p.prompts, seeds=[p.seed], subseeds=[0])
        p.script.before_process_batch(p, *p.args, **named)
    p.parse_extra_network_prompts()
    extra_networks.activate(p, p.extra_network_data)
    if p.script is not None:
        p.script.process_batch(p, *p.args)
    p.latents = [sampled(shared.sd_model, prompt, p) for prompt in p.prompts]
    p.prompts = list(p.all_prompts)
    info = ", ".join(f"{name}: {value}" for name, value in p.extra_generation_params.items())
    pictures = [sd_samplers_common.single_sample_to_image(latent) for latent in p.latents]
    return SimpleNamespace(images=pictures, info=f"{p.prompts[0]}\n{info}")


def sampled(sd_model, prompt, p):
    """One latent, as the host's sampler makes it."""
    predictor, inference = _predictor(sd_model)
    given = prompt_parser.SdConditioning([prompt], width=p.width, height=p.height)
    with torch.inference_mode() if inference else torch.no_grad():
        learned = sd_model.get_learned_conditioning(given)
        sigmas = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.0])
        noise = torch.randn(
            1, 4, p.height // 8, p.width // 8, generator=torch.Generator().manual_seed(p.seed)
        )
        x = noise * sigmas[0]
        for high, low in zip(sigmas[:-1], sigmas[1:], strict=True):
            if shared.state.interrupted:
                break
            x0 = predictor(x, high.expand(1), learned)
            x = x + (x - x0) / high * (low - high)
    return x[0].clone()


def _predictor(sd_model):
    if getattr(sd_model, "forge_objects", None) is None:
        import k_diffusion.external

        wrapper = k_diffusion.external.CompVisDenoiser(sd_model, quantize=False)

        def predict(x, sigma, learned):
            if isinstance(learned, dict):
                cond = {**learned, "c_concat": []}
            else:
                cond = {"c_crossattn": [learned], "c_concat": []}
            return wrapper(x, sigma, cond=cond)

        return predict, False
    patcher = sd_model.forge_objects.unet
    try:
        from backend import memory_management
    except ImportError:
        from ldm_patched.modules import model_management as memory_management
    with torch.inference_mode():
        memory_management.load_models_gpu([patcher])

    def predict(x, sigma, learned):
        named = {"c_crossattn": learned}
        if isinstance(learned, dict):
            named = {"c_crossattn": learned["crossattn"], "y": learned["vector"]}
        return patcher.model.apply_model(x, sigma, transformer_options={}, **named)

    return predict, True

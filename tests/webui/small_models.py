"""Small models as the hosts hold them: ComfyUI's own U-Net class, a text encoder of one layer.

The fakes in ``fake_modules`` answer for the hosts; here are the models that they load, each with
the traps of its host.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from types import SimpleNamespace

import torch
from torch import nn

WIDTH, POOLED, CHUNK = 64, 48, 12
START, END, PAD, WORDS = 900, 901, 901, 3000
SIZES = 6 * 256
SHARED: dict = {}  # a default that the hosts' functions write into
DIFFUSION_STEPS = 1000
_SMALL_CHANNELS, _HEADS = 32, 4


class Chunk:
    """A window of a prompt."""

    def __init__(self, tokens):
        self.tokens = [START, *tokens, *[END] * (CHUNK + 1 - len(tokens))]
        self.multipliers, self.fixes = [1.0] * (CHUNK + 2), []


class SmallTextEncoder(nn.Module):
    """Every word has a random embedding; a matrix mixes in what stands before it.

    As in the hosts a batch is padded to its longest prompt, and emphasis is rescaled over all of
    it (traps 8).
    """

    id_start, id_end, id_pad, chunk_length = START, END, PAD, CHUNK

    def __init__(self, linear, width=WIDTH, pooled=False, embeddings=None):
        super().__init__()
        self.transformer = linear(width, width)
        self.return_pooled = pooled
        self.width, self.batches = width, []
        self.embeddings = embeddings or {}  # of textual inversions
        self.tokenizer = self

    def get_vocab(self):
        words = "cat dog tree house car moon river bridge apple chair horse lamp".split()
        return {f"{word}</w>": token_of(word) for word in words} | {"ab</w>": 1, "##x": 2}

    def process_texts(self, texts):
        chunks = [self._chunks(text) for text in texts]
        return chunks, max(map(len, texts), default=0)

    def _chunks(self, text):
        plain = text.replace("(", " ").replace(")", " ").replace(":1.3", " ").replace(",", " , ")
        parts, ids, fixes = [], [], []
        for word in plain.split():
            if word in self.embeddings:
                vectors = self.embeddings[word]
                fixes.append((len(ids), SimpleNamespace(vec=vectors)))
                ids += [0] * len(vectors)
            else:
                ids.append(token_of(word))
        for begin in range(0, max(1, len(ids)), CHUNK):
            parts.append(Chunk(ids[begin : begin + CHUNK]))
        parts[0].fixes = fixes
        return parts

    def forward(self, texts):
        self.batches.append(len(texts))
        chunks, _ = self.process_texts(texts)
        longest = max(map(len, chunks))
        rows, pooled = [], None
        for number in range(longest):
            now = [one[number] if number < len(one) else Chunk([]) for one in chunks]
            z = torch.stack([self._rows(chunk) for chunk in now])
            z = z + 0.3 * self.transformer(z.cumsum(1) / self._counts())
            if any("(" in text for text in texts):  # the mean of the batch is kept
                weights = torch.tensor([1.3 if "(" in text else 1.0 for text in texts])
                before = z.mean()
                z = z * weights[:, None, None]
                z = z * (before / z.mean())
            pooled = z.mean(1)[:, :POOLED] if pooled is None else pooled
            rows.append(z)
        return (torch.hstack(rows), pooled) if self.return_pooled else torch.hstack(rows)

    __call__ = nn.Module.__call__

    def _counts(self):
        return torch.arange(1, CHUNK + 3).sqrt()[:, None]

    def _rows(self, chunk):
        rows = torch.stack([embedding(token, self.width) for token in chunk.tokens])
        for offset, one in chunk.fixes:
            rows[offset + 1 : offset + 1 + len(one.vec)] = one.vec
        return rows


def token_of(word):
    return 1000 + zlib.crc32(word.casefold().encode()) % WORDS


def embedding(token, width):
    return torch.randn(width, generator=torch.Generator().manual_seed(token))


class Wrapper(nn.Module):
    """As LatentDiffusion holds its U-Net."""

    def __init__(self, network, conditioning_key="crossattn"):
        super().__init__()
        self.diffusion_model, self.conditioning_key = network, conditioning_key

    def forward(self, x, t, c_concat=None, c_crossattn=None, **sdxl):
        if c_crossattn is not None:
            if self.conditioning_key == "hybrid":
                x = torch.cat([x, *c_concat], dim=1)
            return self.diffusion_model(x, t, torch.cat(c_crossattn, 1))
        return self.diffusion_model(x, t, sdxl["crossattn"], y=sdxl["vector"])


class FakeLatentDiffusion(nn.Module):
    """Automatic1111's model: normal tensors that want gradients (trap 5)."""

    is_sd1 = is_sd2 = is_sdxl = is_sd3 = is_sdxl_inpaint = False
    lowvram = False

    def __init__(self, network, encoder, family="sd1", conditioning_key="crossattn"):
        super().__init__()
        self.model = Wrapper(network, conditioning_key)
        self.parameterization = "eps"
        setattr(self, f"is_{family}", True)
        self.register_buffer("alphas_cumprod", alphas_cumprod())
        if family == "sdxl":
            self.conditioner = nn.Module()
            self.conditioner.embedders = nn.ModuleList([encoder])
            self.cond_stage_model = self.conditioner
        else:
            self.cond_stage_model = encoder
        self.encoder_of_tests = encoder
        self.sd_checkpoint_info = SimpleNamespace(name="tiny.safetensors", filename="/m/tiny")
        self.applied_token_merged_ratio = 0

    def apply_model(self, x, t, cond):
        return self.model(x, t, **cond)

    def get_learned_conditioning(self, prompts):
        given = self.encoder_of_tests(list(prompts))
        if not self.is_sdxl:
            return given
        tokens, pooled = given
        sizes = size_numbers(prompts).expand(len(prompts), -1)
        return {"crossattn": tokens, "vector": torch.cat([pooled, sizes], 1)}


def size_numbers(prompts):
    return torch.full((1, SIZES), float(prompts.width or 0) / 1000)


def alphas_cumprod():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, DIFFUSION_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


class ModelSampling(nn.Module):
    """Classic's ``model_sampling``, which leaves the noise to its samplers."""

    def __init__(self, predicts_v=False):
        super().__init__()
        values = alphas_cumprod()
        self.register_buffer("sigmas", ((1 - values) / values) ** 0.5)
        self.register_buffer("log_sigmas", self.sigmas.log())
        self.predicts_v = predicts_v

    def timestep(self, sigma):
        apart = sigma.log() - self.log_sigmas[:, None]
        return apart.abs().argmin(dim=0).view(sigma.shape)

    def sigma(self, timestep):
        t = timestep.float().clamp(0, len(self.sigmas) - 1)
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - share) * self.log_sigmas[low] + share * self.log_sigmas[high]).exp()

    def calculate_input(self, sigma, x):
        return x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt()

    def calculate_denoised(self, sigma, output, x):
        level = sigma.view(-1, 1, 1, 1)
        if self.predicts_v:
            return x / (level**2 + 1) - output * level / (level**2 + 1).sqrt()
        return x - output * level


class Predictor(ModelSampling):
    """Forge's ``predictor``, and reForge's ``model_sampling``."""

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        noise = noise * ((1 + sigma**2).sqrt() if max_denoise else sigma)
        noise += latent
        return noise


class KModel(nn.Module):
    """Forge's ``KModel``; with ``model_sampling`` instead it is Classic's ``BaseModel``."""

    def __init__(self, network, predictor, classic=False):
        super().__init__()
        self.diffusion_model = network
        if classic:
            self.model_sampling = predictor
        else:
            self.predictor, self.computation_dtype = predictor, torch.float32
        self.sampling = [predictor]

    def get_dtype(self):
        return torch.float32

    def apply_model(
        self,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options=SHARED,
        **named,
    ):
        assert "used" not in transformer_options, "the default dictionary is shared by all calls"
        transformer_options["used"] = True
        (predictor,) = self.sampling
        given = predictor.calculate_input(t, x)
        if c_concat is not None:
            given = torch.cat([given, c_concat], 1)
        time = predictor.timestep(t).float()
        output = self.diffusion_model(given, time, context=c_crossattn, **named)
        return predictor.calculate_denoised(t, output.float(), x)


class Patcher:
    """Clones share one module; what is loaded last has its patches merged (trap 7)."""

    def __init__(self, model):
        self.model = model
        self.load_device = self.offload_device = torch.device("cpu")
        self.model_options = {"transformer_options": {}}
        self.lora_patches = {}
        if not hasattr(model, "merged"):
            model.merged = SimpleNamespace(patches=(), backup={})

    def clone(self):
        other = Patcher(self.model)
        other.lora_patches = dict(self.lora_patches)
        return other

    def memory_required(self, shape):
        return math.prod(shape)

    def refresh_loras(self):
        merged = self.model.merged
        if tuple(self.lora_patches) == merged.patches:
            return
        for path, weight in merged.backup.items():
            self.model.get_submodule(path).weight = weight
        merged.backup = {}
        layers = self.model.layers_by_name
        for (_, strength), values in self.lora_patches.items():
            for name, path in layers.items():
                if f"{name}.lora_down.weight" in values:
                    layer = self.model.get_submodule(path)
                    merged.backup.setdefault(path, layer.weight)
                    down, up = (values[f"{name}.lora_{w}.weight"].float() for w in ("down", "up"))
                    change = up @ down * (float(values[f"{name}.alpha"]) / len(down))
                    changed = layer.weight + strength * change
                    layer.weight = nn.Parameter(changed, requires_grad=False)
        merged.patches = tuple(self.lora_patches)


class FakeForgeEngine:
    """Forge's model, or with ``classic`` that of Forge Classic and reForge."""

    is_sd1 = is_sd2 = is_sdxl = is_sd3 = False

    def __init__(self, network, encoder, family="sd1", predicts_v=False, classic=False):
        setattr(self, f"is_{family}", True)
        predictor = (ModelSampling if classic else Predictor)(predicts_v)
        model = KModel(network, predictor, classic)
        model.layers_by_name = {}
        unet, clip = Patcher(model), SimpleNamespace(patcher=Patcher(encoder))
        encoder.layers_by_name = {}
        objects = dict(unet=unet, clip=clip, vae=None, clipvision=None)
        self.forge_objects = ForgeObjects(**objects)
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()
        self.current_lora_hash, self.encoder_of_tests = str([]), encoder
        self.cond_stage_model = encoder if classic else None
        if not classic:
            self.text_processing_engine = encoder
        self.sd_checkpoint_info = SimpleNamespace(name="tiny.safetensors", filename="/m/tiny")
        self.clip_skip = None

    def set_clip_skip(self, clip_skip):
        self.clip_skip = clip_skip

    def get_learned_conditioning(self, prompts):
        try:
            from backend import memory_management as management
        except ImportError:
            from ldm_patched.modules import model_management as management
        management.load_model_gpu(self.forge_objects.clip.patcher)
        given = self.encoder_of_tests(list(prompts))
        if not self.is_sdxl:
            return given
        tokens, pooled = given
        sizes = size_numbers(prompts).expand(len(prompts), -1)
        return {"crossattn": tokens, "vector": torch.cat([pooled, sizes], 1)}


class ForgeObjects(SimpleNamespace):
    def shallow_copy(self):
        return ForgeObjects(**vars(self))


class ForgeLinear(nn.Module):
    """Forge's layer: no ``nn.Linear`` (trap 3)."""

    def __init__(self, in_features, out_features, bias=True, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.parameters_manual_cast = False

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class LoraLinear(nn.Linear):
    """Automatic1111's layer: before each forward the last prompt's LoRAs are merged (trap 7)."""

    def forward(self, x):
        import networks

        networks.network_apply_weights(self)
        return super().forward(x)


def small_unet(linear, family="sd1", in_channels=4, in_place=False):
    """ComfyUI's U-Net with 32 channels and random weights that make the prompt matter."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    class Operations(comfy.ops.disable_weight_init):
        Linear = linear

    sdxl = family == "sdxl"
    named = {"num_classes": "sequential", "adm_in_channels": POOLED + SIZES} if sdxl else {}
    network = UNetModel(
        image_size=32,
        in_channels=in_channels,
        out_channels=4,
        model_channels=_SMALL_CHANNELS,
        num_res_blocks=[1, 1],
        channel_mult=[1, 1],
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        context_dim=WIDTH,
        num_heads=_HEADS,
        num_head_channels=-1,
        use_spatial_transformer=True,
        use_linear_in_transformer=sdxl,
        legacy=False,
        dtype=torch.float32,
        operations=Operations,
        **named,
    ).eval()
    draw(network)
    if in_place:
        for block in network.modules():
            if type(block).__name__ == "BasicTransformerBlock":
                block.__class__ = in_place_block(type(block))
    return network


def in_place_block(kind):
    """A block that adds in place (trap 4), and whose own checkpointing is on (trap 10)."""

    class BasicTransformerBlock(kind):
        checkpoint = False

        def forward(self, x, context=None, transformer_options=SHARED):
            x += self.attn1(self.norm1(x))
            x += self.attn2(self.norm2(x), context=context)
            skip = x
            x = self.ff(self.norm3(x))
            x += skip
            return x

    return BasicTransformerBlock


def draw(network):
    """Random weights; attention to the prompt is peaked, and adds much."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if weight.ndim < 2:
                weight.copy_(1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise)
            else:
                gain = 2.0 if "attn2" in name else 1.0
                gain = 0.3 if name.startswith("label_emb") else gain
                weight.copy_(gain * noise / math.sqrt(weight[0].numel()))


def build(kind, family="sd1", in_channels=4, predicts_v=False, inversions=None):
    """The model of a kind of host, as it holds it once it is loaded."""
    forge = kind in ("forge", "classic")
    linear = ForgeLinear if forge else LoraLinear
    # Trap 5: what Forge loads are inference tensors.
    with torch.inference_mode() if forge else contextlib.nullcontext():
        network = small_unet(linear, family, in_channels, in_place=forge)
        encoder = SmallTextEncoder(linear, pooled=family == "sdxl", embeddings=inversions)
        draw(encoder)
        if not forge:
            key = "hybrid" if in_channels == 9 else "crossattn"
            model = FakeLatentDiffusion(network, encoder, family, key)
            model.parameterization = "v" if predicts_v else "eps"
        else:
            model = FakeForgeEngine(network, encoder, family, predicts_v, kind == "classic")
    if forge and family == "sdxl" and kind == "forge":
        model.text_processing_engine_l = encoder
        del model.text_processing_engine
    return model

"""Fake of ``modules.shared``: options, flags, and the model that is loaded."""

import threading
from types import SimpleNamespace

from . import sd_models


class Options(SimpleNamespace):
    """Options by name; what nobody set is the host's default."""


class State:
    """Progress and stop, as flags that anybody may set."""

    def __init__(self):
        self.jobs, self.seen = [], []
        self.server_command = threading.Event()
        self.end()

    def begin(self, job="(unknown)"):
        self.skipped = self.interrupted = self.stopping_generation = False
        self.job, self.job_no, self.job_count = job, 0, -1
        self.sampling_step = self.sampling_steps = 0
        self.current_latent = self.current_image = self.textinfo = None
        self.jobs.append(job)

    def end(self):
        self.job, self.job_count, self.job_no = "", 0, 0
        self.skipped = self.interrupted = self.stopping_generation = False
        self.sampling_step = self.sampling_steps = 0
        self.textinfo = None

    def interrupt(self):
        self.interrupted = True

    def skip(self):
        self.skipped = True

    def stop_generating(self):
        self.stopping_generation = True

    def assign_current_image(self, image):
        self.current_image = image


opts = Options(
    CLIP_stop_at_last_layers=1,
    enable_quantization=False,
    sd_hypernetwork="None",
    token_merging_ratio=0.0,
    emphasis="Original",
    outdir_txt2img_samples="",
    samples_format="png",
)
cmd_opts = SimpleNamespace(
    lora_dir="", medvram=False, lowvram=False, data_path="", api_auth=None, api=True
)
state = State()
loaded_hypernetworks = []
demo = None


def __getattr__(name):
    if name == "sd_model":  # as in the hosts, where asking loads
        return sd_models.model_data.get_sd_model()
    raise AttributeError(name)

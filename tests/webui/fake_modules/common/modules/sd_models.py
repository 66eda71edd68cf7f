"""Fake of ``modules.sd_models``. ``forge_model_reload`` is there where the fake host is Forge."""


class FakeInitialModel:
    """Forge's stand-in until the first picture is drawn."""

    cond_stage_model = None


class SdModelData:
    def __init__(self):
        self.sd_model = None
        self.forge_loading_parameters = {}

    def get_sd_model(self):
        return self.sd_model


model_data = SdModelData()


def apply_token_merging(sd_model, ratio):
    sd_model.applied_token_merged_ratio = ratio

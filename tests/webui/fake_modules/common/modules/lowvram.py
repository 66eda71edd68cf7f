"""Fake of ``modules.lowvram``: modules wait until a hook moves them; one is in at a time."""

module_in_gpu = None
moves = []


def send_everything_to_cpu():
    global module_in_gpu
    if module_in_gpu is not None:
        moves.append(("out", id(module_in_gpu)))
    module_in_gpu = None


def is_enabled(sd_model):
    return getattr(sd_model, "lowvram", False)


def setup_for_low_vram(sd_model, use_medvram):
    sd_model.lowvram = True

    def send_me_to_gpu(module, _):
        global module_in_gpu
        if module is not module_in_gpu:
            send_everything_to_cpu()
            moves.append(("in", id(module)))
            module_in_gpu = module

    sd_model.cond_stage_model.register_forward_pre_hook(send_me_to_gpu)
    if use_medvram:
        sd_model.model.register_forward_pre_hook(send_me_to_gpu)
        return
    network = sd_model.model.diffusion_model
    blocks = [network.time_embed, *network.middle_block.children()]
    # ComfyUI's U-Net calls the layers of these blocks, Automatic1111's the blocks.
    for block in [*network.input_blocks, *network.output_blocks]:
        blocks += block.children()
    for block in blocks:
        block.register_forward_pre_hook(send_me_to_gpu)
